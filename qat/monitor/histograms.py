"""Histograms of latent weights in units of their own scale, a family each, with the borders between codes.

Training pulls latent weights towards the codes or piles them up at a border, where they flip: the same picture before and after
says which. In units of the scale layers of all sizes share an axis; what lies beyond its ends is counted in the outermost bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qat.conversion.families import families
from qat.conversion.layers import bitlinears
from qat.monitor.weights import with_borders
from qat.nn.bitlinear import BitLinear

REACH, BINS = 3.0, 120


@dataclass
class Histogram:
    """Of a family's latent weights in units of their scales: each that is finite is counted once."""

    counts: np.ndarray
    """int64 [BINS]."""
    borders: list[float]
    """Between codes, of the family's first layer."""

    @property
    def edges(self) -> np.ndarray:
        """Of the bins, float64 [BINS + 1]."""
        return np.linspace(-REACH, REACH, BINS + 1)

    @property
    def centers(self) -> list[float]:
        """Of the bins."""
        return [round(one, 6) for one in ((self.edges[1:] + self.edges[:-1]) / 2).tolist()]

    @property
    def shares(self) -> list[float]:
        """Of all that is counted, in each bin."""
        return [round(share, 7) for share in (self.counts / max(self.counts.sum(), 1)).tolist()]


@torch.no_grad()
def latent_histograms(model: nn.Module) -> dict[str, Histogram]:
    """Family -> the histogram of its latent weights."""
    layers = dict(bitlinears(model))
    found: dict[str, Histogram] = {}
    for name, family in families(layers).items():
        values, borders = _in_scales(layers[name])
        counts = torch.histc(values.clamp(-REACH, REACH), BINS, -REACH, REACH).long().cpu().numpy()
        one = found.setdefault(family, Histogram(np.zeros(BINS, dtype=np.int64), borders))
        one.counts = one.counts + counts
    return found


def _in_scales(layer: BitLinear) -> tuple[Tensor, list[float]]:
    """Latent weights over the scale of their row, float32, those that are finite; medians of the borders likewise."""
    rows, scales, borders = with_borders(layer, layer.quantized()[1])
    unit = scales.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    values = (rows / unit).flatten()
    middle = [] if borders is None else (borders / unit).median(0).values.tolist()
    return values[values.isfinite()], [round(value, 4) for value in middle]
