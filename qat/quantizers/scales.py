"""What shares a scale, the shapes that scales have, and the statistics of magnitudes that they are.

Legend: N out_features, K in_features, G groups along K, R rows that share a scale each, L weights a row.

The scale is rounded to `scale_dtype` before codes are taken with it, so one single value is trained with, stored and read back.

Means are summed in float64 and rounded once to float32. So they do not depend on who sums in which order: threads, instruction
sets, shards of several devices, a GPU. Sums of float32 would: half of all matrices then get a scale an ulp off, and with it a few
other codes. Strictly, two orders can still round apart where the mean lies within their float64 errors of the middle between two
float32: with L weights in blocks of B that is L / B + B parts in 2^53 at most, against the 2^24 that a float32 resolves, so less
than once in 10^5 scales for L = 2^24 and B = 4096, as all terms have one sign; and never for weights in bfloat16 or float16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qat.quantizers.record import WeightOptions


def mean(values: Tensor) -> Tensor:
    """The mean [R, 1], float32, of rows [R, L]: the same in any order of the sum (see above)."""
    return values.mean(-1, keepdim=True, dtype=torch.float64).float()


_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "absmean": mean,
    "absmax": lambda magnitude: magnitude.amax(-1, keepdim=True),
    "absmedian": lambda magnitude: magnitude.median(-1, keepdim=True).values,
}
_SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def statistic(rows: Tensor, options: WeightOptions, **_: Tensor) -> Tensor:
    """`quant.scale` of the magnitudes of rows [R, L], times `quant.scale_multiplier`: [R, 1]."""
    return multiplied(_REDUCE[options.scale](rows.abs()), options)


def multiplied(statistic: Tensor, options: WeightOptions) -> Tensor:
    """A statistic times `quant.scale_multiplier`."""
    return statistic if options.scale_multiplier == 1 else statistic * options.scale_multiplier


def check_group_size(k: int, group_size: int | None) -> None:
    """ValueError unless groups of that size fill a row of K weights."""
    if group_size is not None and k % group_size:
        raise ValueError(
            f"in_features={k} is not a multiple of quant.group_size={group_size}; choose a divisor (for some"
            " layers: quant.overrides={PATTERN: {group_size: N}}), or exclude the layer"
        )


def check_block(k: int, block: int, weight: str) -> None:
    """ValueError unless blocks of that many weights fill a row of K weights."""
    if k % block:
        raise ValueError(f"in_features={k} is not a multiple of {block}, as quant.weight={weight} needs; exclude the layer")


def scale_rows(w: Tensor, granularity: str, group_size: int | None) -> Tensor:
    """View w [N, K] as [R, L], each row sharing one scale."""
    n, k = w.shape
    if granularity == "tensor":
        return w.reshape(1, n * k)
    if granularity == "channel":
        return w
    assert group_size is not None
    check_group_size(k, group_size)
    return w.reshape(n * (k // group_size), group_size)


def scale_shape(n: int, k: int, granularity: str, group_size: int | None, components: int = 1) -> tuple[int, int]:
    """Shape of the weight scale of a layer [N, K]: [1, 1], [N, 1] or [N, K / group_size], wider by the components."""
    if granularity == "tensor":
        return (1, components)
    return (n, components * (1 if granularity == "channel" else k // (group_size or k)))


def round_scale(scale: Tensor, scale_dtype: str) -> Tensor:
    """`scale` rounded to that dtype within its range: neither 0 (float16 ends at 6e-8) nor infinity (above 65504)."""
    return scale.clamp(*scale_limits(scale_dtype)).to(_SCALE_DTYPES[scale_dtype]).float()


def scale_limits(scale_dtype: str) -> tuple[float, float]:
    """The least number above 0 and the largest finite one of a scale's dtype."""
    limits = torch.finfo(_SCALE_DTYPES[scale_dtype])
    return limits.tiny * limits.eps, limits.max


def check_weight(w: Tensor) -> None:
    """ValueError unless w is a floating-point matrix."""
    if w.ndim != 2 or not w.is_floating_point():
        raise ValueError(f"w must be a floating-point matrix [N, K], not {w.dtype} {list(w.shape)}")


def dequantize_weight(t: Tensor, scale: Tensor) -> Tensor:
    """t * scale, float32 [N, K], for t [N, K] and scale [1 | N, 1 | G]."""
    n, k = t.shape
    groups = scale.shape[1]
    if groups <= 1:
        return t * scale
    return (t.reshape(n, groups, k // groups) * scale[..., None]).reshape(n, k)
