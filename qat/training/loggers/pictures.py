"""Pictures for trackers: heat maps of layers by steps, and rows of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qat.monitor.layers import read_layers
from qat.monitor.table import HEALTH, find

MOST_LAYERS, MOST_LOOKS = 400, 400
"""Cells of a heat map; beyond them every n-th is shown, which the title says."""


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
