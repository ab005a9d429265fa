"""Heat maps of layers by steps, small enough for a page however many layers and looks there are.

More layers than a chart has rows are taken together in bands of neighbours of the same family, and a band shows its worst layer:
a mean would hide the one that is to be seen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from qat.conversion.families import families
from qat.reporting.page.parts import Figure

MOST_LAYERS, MOST_LOOKS = 180, 100
MOST_ROWS = 4 * MOST_LAYERS
"""Of a map whose layers are hardly two of a family, so that bands do not help."""


def heat_figure(title: str, values: Any, names: Sequence[str], steps: Sequence[int], caption: str, unit: str = "") -> Figure:
    """values [looks, layers], float; NaN and infinite ones are blank. Rows are families, in each from the first layer."""
    picked = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_LOOKS)).round().astype(int))
    table = np.asarray(values, dtype=np.float64)[picked]
    table[~np.isfinite(table)] = np.nan
    rows, labels = bands(table.T, names)
    more = f" {len(names):,} layers in {len(labels):,} bands, each its worst layer." if len(labels) < len(names) else ""
    if len(labels) > MOST_ROWS:
        more += f" The first {MOST_ROWS} of {len(labels):,} rows."
        rows, labels = rows[:MOST_ROWS], labels[:MOST_ROWS]
    data = {
        "type": "heatmap",
        "x": [int(steps[i]) for i in picked],
        "y": labels,
        "z": [[float(f"{value:.3g}") for value in row] for row in rows],
        "colorscale": [[0, "--heat-0"], [0.35, "--heat-1"], [0.7, "--heat-2"], [1, "--heat-3"]],
        "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": unit, "side": "right"}},
        "hovertemplate": "%{y}<br>step %{x}: %{z}<extra></extra>",
        "hoverongaps": False,
        "xgap": 0,
        "ygap": 1 if len(labels) < 60 else 0,
        **_limits(rows),
    }
    height = max(200, min(760, 90 + (16 if len(labels) < 40 else 9 if len(labels) < 80 else 4) * len(labels)))
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"autorange": "reversed", "type": "category", "tickfont": {"size": 10}},
    }
    return Figure(title, [data], layout, caption + more, height=height)


def _limits(rows: Any) -> dict[str, float]:
    """The scale from the least to the 99th percentile: one look that explodes would make all others one colour."""
    found = rows[np.isfinite(rows)]
    if not len(found):
        return {"zmin": 0.0, "zmax": 1.0}
    low, high = float(found.min()), float(np.percentile(found, 99))
    return {"zmin": low, "zmax": high if high > low else low + max(abs(low), 1e-12)}


def bands(table: Any, names: Sequence[str]) -> tuple[Any, list[str]]:
    """(rows [B, looks], their names): the layers [L, looks] by family, neighbours taken together where there are too many."""
    members_of: dict[str, list[int]] = {}
    for i, kind in enumerate(families(names).values()):
        members_of.setdefault(kind, []).append(i)
    share = max(1, -(-len(names) // max(1, MOST_LAYERS - len(members_of))))
    rows, labels = [], []
    for family, members in members_of.items():
        for start in range(0, len(members), share):
            band = members[start : start + share]
            rows.append(_worst(table[band]))
            labels.append(_label(family, [names[i] for i in band]))
    return np.array(rows), _distinct(labels)


def _worst(band: Any) -> Any:
    """The largest of each look; NaN where no layer has a value."""
    known = np.isfinite(band)
    return np.where(known.any(0), np.where(known, band, -np.inf).max(0), np.nan)


def _label(family: str, names: Sequence[str]) -> str:
    numbers = [found[-1] for name in names if (found := re.findall(r"\.(\d+)\.", name))]
    if len(numbers) != len(names):
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return f"{family} {numbers[0]}" + (f"–{numbers[-1]}" if len(numbers) > 1 else "")


def _distinct(labels: Sequence[str]) -> list[str]:
    """plotly would draw rows of one name over each other."""
    seen: dict[str, int] = {}
    found = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        found.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return found
