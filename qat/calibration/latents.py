"""Latent weights that quantize to given codes and scales: how calibrated layers become the start of training.

BitLinear takes its scale from the latent weight itself, s = a mean|W|, so a weight of the wanted codes must also have the
wanted mean. Within its cell each weight stays as near to where it was as that allows: zeros keep their values up to EDGE s, the
others lie at EDGE s or further, by what is left of the mean, shared out as they lay further before. For s / a = mean|W| the
codes and, but for rounding, the scales are then those that were asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat import ops
from qat.calibration.compensation import compensate
from qat.config import QuantConfig
from qat.conversion.layers import bitlinears
from qat.conversion.swap import swap
from qat.quantizers.scales import scale_rows

ZEROS, OTHERS = 0.45, 0.55
"""Of the scale: how far zeros reach, and where the others begin; codes change at half of it."""
AS_BEFORE = 0.05
"""Of the scale, beside how far a weight lay: so that none stays at the edge."""


def latent(weight: Tensor, codes: Tensor, scale: Tensor, config: QuantConfig) -> Tensor:
    """A weight float32 [N, K] near `weight` that quantizes to these codes int8 [N, K] and scale float32 [1 | N, G].

    Raises:
        ValueError: there is none for this quantizer.
    """
    spread = scale_rows(scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1).expand_as(weight), *_sharing(config))
    rows, t = (scale_rows(one.float(), *_sharing(config)) for one in (weight, codes))
    found = _within_cells(rows, t, spread[:, :1], config.scale_multiplier).view_as(weight)
    again, _ = ops.quantize_weight(found, config)
    if not torch.equal(again, codes):
        raise ValueError(f"no latent weight of quant.weight={config.weight} was found for {int((again != codes).sum())} codes")
    return found


def _sharing(config: QuantConfig) -> tuple[str, int | None]:
    return config.granularity, config.group_size


def _within_cells(rows: Tensor, codes: Tensor, scale: Tensor, multiplier: float) -> Tensor:
    """[R, L] for codes [R, L] and scales [R, 1]."""
    used, total = codes.abs(), scale / multiplier * rows.shape[1]
    zeros = (1 - used) * rows.clamp(-ZEROS * scale, ZEROS * scale)
    least = OTHERS * scale * used.sum(1, keepdim=True)
    left = total - least - zeros.abs().sum(1, keepdim=True)
    zeros = torch.where(left > 0, zeros, torch.zeros_like(zeros))
    left = total - least - zeros.abs().sum(1, keepdim=True)
    beyond = used * ((rows * codes - OTHERS * scale).clamp_min(0) + AS_BEFORE * scale)
    shared = left.clamp_min(0) * beyond / beyond.sum(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return zeros + codes * (OTHERS * scale + shared)


def check_start(config: QuantConfig) -> None:
    """ValueError for a quantizer for which no latent weights are known that quantize to given codes and scales."""
    what = f"model.start=ptq does not fit quant.weight={config.weight}, quant.components={config.components}"
    row = config.quantizer
    if row.parameters or config.planes > 1 or config.scale != "absmean" or not row.statistical:
        raise ValueError(
            f"{what}: its scale is not the mean of the latent weights' magnitudes; use ternary with quant.scale=absmean"
        )
    generator = torch.Generator().manual_seed(0)
    width = config.group_size or 64
    codes = torch.randint(-1, 2, (8, width), dtype=torch.int8, generator=generator)
    try:
        latent(
            torch.randn(8, width, generator=generator), codes, torch.ones(1 if config.granularity == "tensor" else 8, 1), config
        )
    except ValueError as error:
        raise ValueError(f"{what}: {error}; use ternary with quant.scale=absmean") from error


def start_calibrated(base: nn.Module, model: nn.Module, windows: list[Tensor]) -> dict[str, Any]:
    """Give the BitLinear layers of `model` latent weights that quantize to what `compensate` finds, in place; its facts.

    Arguments and errors as there. A layer that keeps full precision's weights, since it saw no token, is left as it is.
    """
    layers = dict(bitlinears(model))
    found = compensate(base, model, windows)
    solved = {name: model.get_submodule(name) for name in layers}
    swap(model, dict(layers))
    with torch.no_grad():
        for name in found.errors:
            packed, layer = solved[name], layers[name]
            layer.weight.copy_(latent(layer.weight, packed.codes(), packed.weight_scale, layer.config))  # type: ignore[operator, arg-type]
    return found.facts()
