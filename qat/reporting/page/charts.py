"""Figures of what was logged: losses with the phases of training, and every other metric in a small chart of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qat.reporting.page.parts import SERIES, Figure
from qat.reporting.page.phases import marks
from qat.reporting.page.reading import Run, Series

MOST_POINTS = 600
"""Of a line: more than a chart has pixels for."""
MOST_LINES = 12
"""Of a small chart."""
NO_LOSS = ("epoch", "tokens", "tokens_per_second", "step")


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """Every n-th point, and the last; what is not finite stays where it is picked, as a gap."""
    count = len(series.steps)
    if count <= most:
        return series
    picked = sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
    return Series([series.steps[i] for i in picked], [series.values[i] for i in picked])


def line(name: str, series: Series, colour: str, **more: Any) -> dict[str, Any]:
    """One line; few points are drawn as points, too."""
    series = thinned(series)
    mode = "lines+markers" if len(series.steps) < 20 else "lines"
    style = {"color": colour, "width": 1.8, **more.pop("line", {})}
    return {"type": "scatter", "mode": mode, "name": name, "x": series.steps, "y": series.values, "line": style, **more}


def loss_terms(metrics: Mapping[str, Series]) -> list[str]:
    """What training minimises: the columns of `train/` one level down, `loss` first."""
    found = [name.partition("/")[2] for name in metrics if name.startswith("train/") and name.count("/") == 1]
    return sorted(set(found) - set(NO_LOSS), key=lambda term: (term != "loss", term))


def loss_figure(run: Run) -> Figure | None:
    """Training losses as lines, validation as points and dashes of the same colour."""
    terms = loss_terms(run.metrics)
    colours = {term: SERIES[i % len(SERIES)] for i, term in enumerate(terms)}
    data = []
    for part, words, more in (("train", "", {}), ("val", ", held out", {"dash": "dot"})):
        for term in (term for term in terms if f"{part}/{term}" in run.metrics):
            first = {} if term == "loss" else {"opacity": 0.75}
            data.append(line(term + words, run.metrics[f"{part}/{term}"], colours[term], line=more, **first))
    if not data:
        return None
    values = [value for one in data for value in one["y"] if math.isfinite(value)]
    scale = "log" if values and min(values) > 0 and max(values) > 50 * min(values) else "linear"
    layout = {"yaxis": _values(scale, "nats a token"), "xaxis": {"title": {"text": "step"}}, **marks(run)}
    return Figure("Loss", data, layout, height=380)


def perplexity_figure(run: Run) -> Figure | None:
    """Of validations while training, between the levels of full precision and of the model as converted."""
    series = run.metrics.get("val/perplexity")
    if series is None and "val/ce" in run.metrics:
        ce = run.metrics["val/ce"]
        series = Series(ce.steps, [math.exp(min(value, 700.0)) for value in ce.values])
    if series is None:
        return None
    levels = {key: run.result.perplexity.get(key) for key in ("full_precision", "trained")}
    data = [line("held-out text", series, "--blue")]
    for (key, value), colour in zip(levels.items(), ("--green", "--orange"), strict=True):
        if value is not None and math.isfinite(value):
            style = {"dash": "dash", "width": 1.2}
            ends = Series([series.steps[0], series.steps[-1]], [value, value])
            data.append({**line(f"{key.replace('_', ' ')}, evaluation text", ends, colour, line=style), "mode": "lines"})
    values = [value for one in data for value in one["y"] if math.isfinite(value)]
    scale = "log" if values and max(values) > 20 * min(values) > 0 else "linear"
    layout = {
        "yaxis": {**_values(scale), **(_room(values) if scale == "linear" else {})},
        "xaxis": {"title": {"text": "step"}},
        **marks(run),
    }
    return Figure("Perplexity", data, layout, height=300)


def _values(scale: str, title: str = "") -> dict[str, Any]:
    """An axis, with whole numbers at it: on a logarithmic one plotly writes 5 for each of 0.05, 0.5 and 5."""
    return {"type": scale, "tickformat": "~g", **({"title": {"text": title}} if title else {})}


def _room(values: Sequence[float]) -> dict[str, Any]:
    """Above the values, where the names of phases stand: the first one is the largest, and would lie behind a name."""
    return {"autorangeoptions": {"include": max(values) + 0.15 * (max(values) - min(values))}} if values else {}


def held_out_figures(run: Run) -> list[Figure]:
    """What validations say beside the losses and perplexity: gap, agreement, accuracy."""
    shown = {f"val/{term}" for term in (*loss_terms(run.metrics), "perplexity")}
    left = [name for name in run.metrics if name.startswith("val/") and name not in shown]
    return [_small(run, name.partition("/")[2], [name], "") for name in left if not name.endswith("_ce")]


def small_figures(run: Run, section: str, words: Mapping[str, str] | None = None) -> list[Figure]:
    """A small chart for each metric of a section; names that differ in their last part alone share one."""
    groups: dict[str, list[str]] = {}
    for name in run.metrics:
        if name.startswith(f"{section}/"):
            parts = name.split("/")[1:]
            groups.setdefault("/".join(parts[:-1]) or parts[0], []).append(name)
    return [_small(run, key, names, (words or {}).get(key, "")) for key, names in groups.items()]


def _small(run: Run, title: str, names: Sequence[str], caption: str) -> Figure:
    shown = names[:MOST_LINES]
    data = [line(name.rpartition("/")[2], run.metrics[name], SERIES[i % len(SERIES)]) for i, name in enumerate(shown)]
    caption += f" {len(names) - MOST_LINES} more are not shown." if len(names) > MOST_LINES else ""
    layout = {"showlegend": len(data) > 1, "xaxis": {"title": {"text": "step"}}}
    return Figure(title.replace("_", " "), data, layout, caption, height=230, small=True)
