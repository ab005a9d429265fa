"""What codes and latent weights of one layer say: sums and counts as 0-d tensors, so that a GPU is asked for them once a look."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.nn.bitlinear import BitLinear
from qat.ops.options import weight_options
from qat.quantizers.components import sum_components
from qat.quantizers.latent import as_rows, by_name
from qat.quantizers.record import WeightOptions, resolve
from qat.quantizers.scales import dequantize_weight, scale_rows

NEAR = 0.05
"""Of a scale: a latent weight so close to a threshold is in the dead zone, where a step more or less decides its code."""

PART = 1 << 16
"""Weights: 256 KB."""

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def weight_sums(layer: BitLinear, codes: Tensor, scale: Tensor) -> dict[str, Pair]:
    """Statistic -> sum and count of a layer whose weight quantizes to these codes and scales (`BitLinear.quantized`)."""
    rows, scales, borders = with_borders(layer, scale)
    width = NEAR * scales.abs().amin(1, keepdim=True)
    sums = [torch.stack(_part(layer, at, codes, scale, rows, borders, width)) for at in _parts(layer.weight)]
    kept, rest, squares, near = torch.stack(sums).sum(0, dtype=torch.float64)
    found = {
        "zero_fraction": (codes.numel() - kept, _number(codes.numel(), codes)),
        "scale": (scale.abs().sum(dtype=torch.float64), _number(scale.numel(), scale)),
        "error": (rest, squares),
    }
    return found if borders is None else {**found, "dead_zone": (near, _number(layer.weight.numel(), codes))}


def _parts(weight: Tensor) -> list[slice]:
    """Rows of a weight [N, K] that are looked at together: what a CPU computes of them stays in its cache."""
    n, k = weight.shape
    step = max(n if weight.is_cuda else PART // max(k, 1), 1)
    return [slice(start, start + step) for start in range(0, max(n, 1), step)]


def _part(
    layer: BitLinear, at: slice, codes: Tensor, scale: Tensor, rows: Tensor, borders: Tensor | None, width: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some rows of the weight, float32 []: codes that are not 0, which are 1 or -1; squares of what codes leave, and of the
    weights; and how many weights are near a border."""
    n, planes = len(layer.weight), layer.config.planes
    weight, levels = rows.reshape(layer.weight.shape)[at], codes[at].float()
    rest = weight - sum_components(dequantize_weight(levels, _of(scale, n, at)), planes)
    sums = _squares(levels), _squares(rest), _squares(weight)
    if borders is None:
        return *sums, torch.zeros_like(sums[0])
    mine = weight if len(rows) == 1 else rows.unflatten(0, (n, -1))[at].flatten(0, 1)
    return *sums, _near(mine, _of(borders, n, at), _of(width, n, at))


def _of(value: Tensor, n: int, at: slice) -> Tensor:
    """What those of a weight's N rows have of [1 | N G, X]."""
    return value if len(value) == 1 else value.unflatten(0, (n, -1))[at].flatten(0, 1)


def with_borders(layer: BitLinear, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latent weights [R, L], their scales [R, planes] and the borders [R, B] between codes, float32.

    None in place of borders where the layer's record names none.
    """
    config, record = layer.config, layer.config.quantizer
    rows = scale_rows(layer.weight.detach().float(), config.granularity, config.group_size)
    scales = as_rows(scale, config.planes)
    if record.soft is None or not rows.numel():
        return rows, scales, None
    own = by_name(record, WeightOptions(*weight_options(config)), list(layer.quantizer_parameters().values()))
    return rows, scales, resolve(record.soft)(rows, scales, **own)[1]


def _near(rows: Tensor, borders: Tensor, width: Tensor) -> Tensor:
    """How many latent weights are close to a border, float32 []. Flags are floats: torch compares to bool ten times slower."""
    first, *others = borders.unbind(1)
    near, apart = (rows - first[:, None]).abs_().lt_(width), torch.empty_like(rows)
    for border in others:
        torch.maximum(near, torch.sub(rows, border[:, None], out=apart).abs_().lt_(width), out=near)
    return near.sum()


def _number(count: int, like: Tensor) -> Tensor:
    return torch.tensor(float(count), dtype=torch.float64, device=like.device)


def _squares(values: Tensor) -> Tensor:
    flat = values.reshape(-1)
    return torch.dot(flat, flat)
