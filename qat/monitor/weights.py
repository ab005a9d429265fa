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

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def weight_sums(layer: BitLinear, codes: Tensor, scale: Tensor) -> dict[str, Pair]:
    """Statistic -> sum and count of a layer whose weight quantizes to these codes and scales (`BitLinear.quantized`)."""
    weight, planes = layer.weight.detach().float(), layer.config.planes
    rest = weight - sum_components(dequantize_weight(codes, scale), planes)
    near = _near(*with_borders(layer, scale))
    found = {
        "zero_fraction": (codes.numel() - codes.count_nonzero(), _number(codes.numel(), codes)),
        "scale": (scale.abs().sum(dtype=torch.float64), _number(scale.numel(), scale)),
        "error": (_squares(rest), _squares(weight)),
    }
    return found if near is None else {**found, "dead_zone": (near.count_nonzero(), _number(near.numel(), near))}


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


def _near(rows: Tensor, scales: Tensor, borders: Tensor | None) -> Tensor | None:
    """Which latent weights, bool [R, L], are close to a border; None where there are none."""
    if borders is None:
        return None
    width = NEAR * scales.abs().amin(1, keepdim=True)
    near = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    for border in borders.unbind(1):
        near |= (rows - border[:, None]).abs() < width
    return near


def _number(count: int, like: Tensor) -> Tensor:
    return torch.tensor(float(count), dtype=torch.float64, device=like.device)


def _squares(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float64).square()
