"""Quantizers as pure functions on tensors: W ~ t * scale and x ~ x_q * scale.

Legend: N out_features, K in_features, G groups along K, T tokens.

    ternary   s = max(f|W|, eps)            t = clip(round(W / s), -1, 1)        BitNet b1.58, arXiv:2402.17764, eq. 1-3
    binary    s = max(mean|W|, eps)         t = +1 if W > mean(W) else -1        BitNet, arXiv:2310.11453, eq. 1-3
    int8      s = max(max|x|, eps) / 127    x_q = clip(round(x * 127 / max|x|))  BitNet, eq. 4-5; b1.58 per token

All math is float32 whatever the input's dtype; rounding is half to even (torch.round). The scale is rounded to
`scale_dtype` before the codes are taken, so one single value is trained with, stored and read back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "absmean": lambda magnitude: magnitude.mean(-1, keepdim=True),
    "absmax": lambda magnitude: magnitude.amax(-1, keepdim=True),
    "absmedian": lambda magnitude: magnitude.median(-1, keepdim=True).values,
}
_SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _ternary_codes(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows / scale).round().clamp(-1, 1)


def _binary_codes(rows: Tensor, scale: Tensor) -> Tensor:
    return torch.where(rows > rows.mean(-1, keepdim=True), 1.0, -1.0)


SCHEMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ternary": _ternary_codes, "binary": _binary_codes}


def check_group_size(k: int, group_size: int | None) -> None:
    """ValueError unless groups of that size fill a row of K weights."""
    if group_size is not None and k % group_size:
        raise ValueError(
            f"in_features={k} is not a multiple of quant.group_size={group_size}; choose a divisor, or exclude the layer"
        )


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
    limits = torch.finfo(_SCALE_DTYPES[scale_dtype])
    return scale.clamp(limits.tiny * limits.eps, limits.max).to(_SCALE_DTYPES[scale_dtype]).float()


def quantize_weight(
    w: Tensor, weight: str, scale: str, granularity: str, group_size: int | None, scale_dtype: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Codes t int8 [N, K] in {-1, 0, 1} and the multiplying scale float32 [1 | N, 1 | G] of w [N, K].

    Raises:
        ValueError: w is not a floating-point matrix, or its width is not a multiple of the group size.
    """
    rows, value, shape = weight_scale(w, scale, granularity, group_size, scale_dtype, eps)
    if w.numel() == 0:
        return torch.zeros_like(w, dtype=torch.int8), value.reshape(shape)
    return SCHEMES[weight](rows, value).to(torch.int8).reshape(w.shape), value.reshape(shape)


def check_weight(w: Tensor) -> None:
    """ValueError unless w is a floating-point matrix."""
    if w.ndim != 2 or not w.is_floating_point():
        raise ValueError(f"w must be a floating-point matrix [N, K], not {w.dtype} {list(w.shape)}")


def weight_scale(
    w: Tensor, scale: str, granularity: str, group_size: int | None, scale_dtype: str, eps: float
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """w as float32 [R, L], each row sharing one scale; the scales [R, 1]; and the shape they are returned in."""
    check_weight(w)
    shape = scale_shape(w.shape[0], w.shape[1], granularity, group_size)
    rows = scale_rows(w.float(), granularity, group_size)
    if w.numel() == 0:
        return rows, w.new_full((shape[0] * shape[1], 1), eps, dtype=torch.float32), shape
    value = _REDUCE[scale](rows.abs()).clamp_min(eps)
    return rows, round_scale(value, scale_dtype), shape


def activation_codes(x: Tensor, granularity: str, eps: float) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., K] and the dividing scale 127 / max|x| float32 [..., 1] of x [..., K], as the papers write it.

    Raises:
        ValueError: x has no dimension or is not floating point.
    """
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor [..., K], not {x.dtype} {list(x.shape)}")
    x = x.float()
    if x.numel() == 0:
        return torch.zeros_like(x, dtype=torch.int8), x.new_full((*x.shape[:-1], 1), 127 / eps)
    absmax = x.abs().amax(-1, keepdim=True) if granularity == "token" else x.abs().amax().expand(*x.shape[:-1], 1)
    divisor = 127 / absmax.clamp_min(eps)
    return (x * divisor).round().clamp(-128, 127).to(torch.int8), divisor


def quantize_activation(x: Tensor, granularity: str, eps: float) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., K] and the multiplying scale float32 [..., 1] of x [..., K]: `activation_codes`, inverted.

    With `granularity="tensor"` every token carries the same scale. An all-zero token gives zeros.
    """
    codes, divisor = activation_codes(x, granularity, eps)
    return codes, (1 / divisor).contiguous()


def dequantize_weight(t: Tensor, scale: Tensor) -> Tensor:
    """t * scale, float32 [N, K], for t [N, K] and scale [1 | N, 1 | G]."""
    n, k = t.shape
    groups = scale.shape[1]
    if groups <= 1:
        return t * scale
    return (t.reshape(n, groups, k // groups) * scale[..., None]).reshape(n, k)


def mix(full: Tensor, quantized: Tensor, lam: Tensor | float) -> Tensor:
    """full + lam * (quantized - full) with a straight-through gradient: identity with respect to `full`.

    Source: lambda warm-up of the b1.58 fine-tuning recipe; the gradient is Bengio et al., arXiv:1308.3432.
    """
    return full + (lam * (quantized - full)).detach()
