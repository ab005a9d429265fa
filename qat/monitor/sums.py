"""Statistics of layers as sums and counts, so that a family's, and the whole model's, is exact and no mean of means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Sums = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Statistic -> its sum and its count of each layer, float64 [L]; NaN in both where a layer has none."""
Finish = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(total / np.where(count == 0, np.nan, count))


FINISHES: dict[str, Finish] = {
    "error": lambda total, count: np.sqrt(_ratio(total, count)),
    "grad_norm": lambda total, count: np.sqrt(total),
    "act_absmax": lambda total, count: total,
}
"""What is no share of a count: sums of squares, and a maximum."""
MAXIMA = ("act_absmax",)


def layerwise(sums: Sums) -> dict[str, np.ndarray]:
    """Statistic -> value of each layer, float32 [L]."""
    return {name: FINISHES.get(name, _ratio)(*pair).astype(np.float32) for name, pair in sums.items()}


def groupwise(sums: Sums, families: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """`quant/NAME` of all layers and `quant/FAMILY/NAME` of each family, for those `names` that were measured."""
    labels, kinds = np.array(families), list(dict.fromkeys(families))
    groups = np.stack([np.ones(len(labels), dtype=bool), *(labels == kind for kind in kinds)])
    found: dict[str, float] = {}
    for name in (name for name in names if name in sums):
        values = FINISHES.get(name, _ratio)(*(_joined(part, groups, name in MAXIMA) for part in sums[name]))
        found |= dict(zip([f"quant/{name}", *(f"quant/{kind}/{name}" for kind in kinds)], values.tolist(), strict=True))
    return {name: value for name, value in found.items() if not np.isnan(value)}


def _joined(part: np.ndarray, groups: np.ndarray, largest: bool) -> np.ndarray:
    """Of each group [G, L] the sum, or the maximum, over its layers; NaN where none was measured."""
    there = groups & ~np.isnan(part)
    values = np.where(there, part, -np.inf if largest else 0.0)
    return np.where(there.any(1), values.max(1) if largest else values.sum(1), np.nan)
