"""Histograms of latent weights in units of their own scale, a family each, with the borders between codes.

Training pulls latent weights towards the codes or piles them up at a border, where they flip: the same picture before and after
says which. In units of the scale layers of all sizes share an axis; what lies beyond its ends is counted in the outermost bins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.conversion.layers import bitlinears
from qat.monitor.families import families
from qat.monitor.weights import with_borders
from qat.nn.bitlinear import BitLinear

REACH, BINS = 3.0, 120


@torch.no_grad()
def latent_histograms(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Family -> `centers` of bins in scales, `shares` of its weights in each, `borders` between codes of its first layer."""
    layers = dict(bitlinears(model))
    found: dict[str, dict[str, Any]] = {}
    for name, family in families(layers).items():
        rows, borders = _in_scales(layers[name])
        counts = torch.histc(rows.clamp(-REACH, REACH), BINS, -REACH, REACH).double().cpu()
        one = found.setdefault(family, {"counts": torch.zeros(BINS, dtype=torch.float64), "borders": borders})
        one["counts"] += counts
    width = 2 * REACH / BINS
    centers = [round(-REACH + (i + 0.5) * width, 6) for i in range(BINS)]
    return {
        family: {"centers": centers, "shares": _shares(one["counts"]), "borders": one["borders"]} for family, one in found.items()
    }


def _shares(counts: Tensor) -> list[float]:
    return [round(share, 7) for share in (counts / counts.sum().clamp_min(1)).tolist()]


def _in_scales(layer: BitLinear) -> tuple[Tensor, list[float]]:
    """Latent weights over the scale of their row, float32, those that are finite; medians of the borders likewise."""
    rows, scales, borders = with_borders(layer, layer.quantized()[1])
    unit = scales.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    values = (rows / unit).flatten()
    middle = [] if borders is None else (borders / unit).median(0).values.tolist()
    return values[values.isfinite()], [round(value, 4) for value in middle]
