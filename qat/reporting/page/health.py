"""Sections on the health of quantization: layers by steps, latents before and after, and what quantizing each layer costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qat.monitor.table import HEALTH
from qat.reporting.page.charts import line
from qat.reporting.page.heat import heat_figure
from qat.reporting.page.parts import SERIES, Block, Cell, Figure, Section, Table, name_cell
from qat.reporting.page.reading import Run

MOST_BARS, MOST_FAMILIES = 40, 16
MAPS = ("flip_rate", "zero_fraction", "error")
"""Of what the file of layers holds: the maps of the page. The others are curves of families."""


def health_section(run: Run) -> Section:
    """Heat maps of layers by steps, then curves."""
    figures = [figure for name in MAPS if (figure := _map(run, name))] + _curves(run)
    return Section("health", "Quantization health", figures, "No layer was looked at while it trained.")


def _curves(run: Run) -> list[Figure]:
    """A chart a statistic: a line of the whole model and one of each family, so that the odd one is seen."""
    groups: dict[str, dict[str, str]] = {}
    for name in sorted((name for name in run.metrics if name.startswith("quant/")), key=lambda name: name.count("/")):
        _, *family, statistic = name.split("/")
        groups.setdefault(statistic, {})["/".join(family) or "all"] = name
    return [_curve(run, statistic, names) for statistic, names in groups.items()]


def _curve(run: Run, statistic: str, names: dict[str, str]) -> Figure:
    colours = ("--text", *SERIES) if "all" in names else SERIES
    shown = list(names.items())[: len(colours)]
    data = [line(family, run.metrics[name], colour) for (family, name), colour in zip(shown, colours, strict=False)]
    data = [{**one, "mode": "lines", "line": {**one["line"], "width": 2.2 if one["name"] == "all" else 1}} for one in data]
    layout = {"xaxis": {"title": {"text": "step"}}, "legend": {"font": {"size": 10}}, "showlegend": len(data) > 1}
    said = HEALTH.get(statistic, ("", "", ""))[2] + _more(len(names) - len(shown), "families")
    return Figure(statistic.replace("_", " "), data, layout, said, height=270, small=True)


def _more(count: int, what: str) -> str:
    return f" {count} more {what} are not shown." if count > 0 else ""


def _map(run: Run, name: str) -> Figure | None:
    values = run.layers.get(name)
    if values is None or not np.isfinite(values).any():
        return None
    unit, _, says = HEALTH[name]
    names, steps = [str(one) for one in run.layers["layer"]], [int(step) for step in run.layers["step"]]
    return heat_figure(name.replace("_", " ").capitalize(), values, names, steps, says, unit)


def latents_section(run: Run) -> Section:
    """A histogram a family, before and after, with the thresholds between codes."""
    families = {name: one for name, one in (run.latents.get("families") or {}).items() if isinstance(one, dict)}
    figures = [_histogram(name, one) for name, one in list(families.items())[:MOST_FAMILIES] if one.get("centers")]
    about = "Latent weights in units of their layer's scale; dashed lines are the thresholds between codes."
    about += _more(len(families) - MOST_FAMILIES, "families")
    return Section("latents", "Latent weights, before and after", figures, about=about)


def _histogram(name: str, one: dict[str, Any]) -> Figure:
    filled = {"fill": "tozeroy", "fillcolor": "--phase"}
    data = []
    if one.get("before"):
        data.append(_steps("as converted", one["centers"], one["before"], "--muted", filled))
    if one.get("after"):
        data.append(_steps("after training", one["centers"], one["after"], "--blue", {}))
    dashed = {"color": "--orange", "width": 1, "dash": "dash"}
    where = {"type": "line", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "line": dashed}
    shapes = [{**where, "x0": x, "x1": x} for x in one.get("thresholds") or []]
    layout = {"shapes": shapes, "yaxis": {"tickformat": ".1%", "rangemode": "tozero"}}
    return Figure(name, data, layout, height=230, small=True)


def _steps(name: str, x: list[float], y: list[float], colour: str, more: dict[str, Any]) -> dict[str, Any]:
    style = {"color": colour, "width": 1.6, "shape": "hvh"}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": style, **more}


def damage_section(run: Run) -> Section:
    """The damage map that was made at the start."""
    return Section("damage", "Damage map", damage_blocks(run.damage) if run.damage else [])


def damage_blocks(found: dict[str, Any]) -> list[Block]:
    """The table of forms, bars of families and of the worst layers."""
    forms = {"nothing": found.get("full_precision"), **(found.get("forms") or {})}
    rows = [
        [name_cell(name), Cell(_number(one["kl"])), Cell(_number(_perplexity(one["nll"])))] for name, one in forms.items() if one
    ]
    table = Table(
        ["quantized", "KL, nats a token", "perplexity"], rows, f"On {found.get('tokens', 0):,} tokens, before training."
    )
    bars = [_bars(words, found[key]) for key, words in (("families", "Families"), ("layers", "Layers")) if found.get(key)]
    return [table, *bars]


def _number(value: float) -> str:
    return f"{value:,.4g}"


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _bars(title: str, damages: dict[str, dict[str, float]]) -> Figure:
    worst = sorted(damages.items(), key=lambda item: -item[1]["kl"])
    caption = f"The worst {MOST_BARS} of {len(worst):,}." if len(worst) > MOST_BARS else ""
    shown = worst[:MOST_BARS]
    data = {
        "type": "bar",
        "orientation": "h",
        "x": [one["kl"] for _, one in shown],
        "y": [name for name, _ in shown],
        "marker": {"color": "--blue"},
        "hovertemplate": "%{y}<br>KL %{x:.4g} nats<extra></extra>",
    }
    layout = {
        "yaxis": {"autorange": "reversed", "type": "category", "tickfont": {"size": 10}},
        "xaxis": {"title": {"text": "KL, nats a token"}, "rangemode": "tozero"},
        "hovermode": "closest",
    }
    return Figure(title, [data], layout, caption, height=max(160, 70 + 18 * len(shown)))
