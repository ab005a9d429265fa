"""Pictures for trackers: heat maps of layers by steps, and rows of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qat.conversion.layers import bitlinears
from qat.monitor.families import families
from qat.monitor.layers import read_layers
from qat.monitor.table import HEALTH, find

WIDEST, BINS = 4.0, 64
MOST_LAYERS, MOST_LOOKS = 400, 400
"""Cells of a heat map; beyond them every n-th is shown, which the title says."""


def latent_histograms(model: nn.Module) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`latents/<family>` -> (counts int64 [64], edges [65]) of latent weights, in units of their layer's mean magnitude.

    In these units the thresholds of every ternary quantizer lie near 0.5, whatever the layer. What is farther out than 4 is
    counted in the outermost bins, so that the counts are of all weights.
    """
    edges, counts = np.linspace(-WIDEST, WIDEST, BINS + 1), dict[str, np.ndarray]()
    layers = dict(bitlinears(model))
    for name, kind in families(layers).items():
        weight = layers[name].weight.detach().float()
        unit = (weight / weight.abs().mean().clamp(min=1e-12)).clamp(-WIDEST, WIDEST)
        found = unit.flatten().histc(BINS, -WIDEST, WIDEST).long().cpu().numpy()
        family = f"latents/{kind}"
        counts[family] = counts.get(family, 0) + found
    return {family: (found, edges) for family, found in counts.items()}


def heat_maps(folder: Path) -> dict[str, Any]:
    """`layers/<what>` -> a plotly figure of layers by steps of a run, for each statistic that was measured of any layer."""
    from plotly.graph_objects import Figure, Heatmap

    looks = read_layers(folder)
    if not looks:
        return {}
    down, across = -(-len(looks["layer"]) // MOST_LAYERS), -(-len(looks["step"]) // MOST_LOOKS)
    less = f", every {down}. layer and {across}. look" if down * across > 1 else ""
    names, steps = looks["layer"][::down].tolist(), looks["step"][::across].tolist()
    figures = {}
    for what, (_, _, says) in HEALTH.items():
        values = looks[what][::across, ::down].T
        if np.isfinite(values).any():
            cells = np.where(np.isfinite(values), values, np.nan)
            figure = Figure(Heatmap(z=cells, x=steps, y=names, colorscale="Viridis"))
            figure.update_layout(title=f"{says.rstrip('.')}{less}", xaxis_title="step", height=max(300, 14 * len(names)))
            figures[f"layers/{what}"] = figure
    return figures


def result_rows(numbers: dict[str, float]) -> list[list[Any]]:
    """[name, value, unit, sentence] of each number of the result."""
    return [[name, value, find(name).unit, find(name).says] for name, value in numbers.items()]


def packed_folder(folder: Path) -> Path | None:
    """The packed model of a run, where it has one."""
    return found if (found := folder / "packed").is_dir() else None
