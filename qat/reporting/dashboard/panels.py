"""Panels of the dashboards: what a chart draws is a name of the table of metrics, checked when it is made."""

from __future__ import annotations

from typing import Any

from qat.monitor.table import HEALTH, METRICS, find

COLUMNS, WIDTH, HEIGHT = 3, 8, 6
OVERVIEW = ("train/loss", "val/gap", "val/ce", "quant/flip_rate", "quant/zero_fraction", "speed/tokens_per_second")
RESULT = "result/log_ratio_trained"
"""What runs are compared by: ln(trained / full precision)."""
SETTINGS = ("optim.lr", "optim.latent_lr_multiplier", "quant.granularity", "quant.weight", "trainer.max_steps", "data.batch_size")
ENDS = ("result/bytes/packed_model", "result/perplexity/trained", RESULT)


def charts(section: str) -> list[Any]:
    """Line charts of a section: one for each metric, and of patterns one that draws all that fit."""
    return _placed([_chart(name) for name in _names(section)])


def _names(section: str) -> list[str]:
    if section == "Overview":
        return list(OVERVIEW)
    if section == "Quantization health":
        return [f"quant/{name}" for name in HEALTH]
    if section == "Families":
        return [f"quant/{{family}}/{name}" for name in HEALTH]
    part = {"Optimization": "optim", "Speed": "speed"}[section]
    return [name for name, metric in METRICS.items() if metric.section == part]


def _chart(name: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if "{" in name:
        pattern = "^" + "[^/]+".join(part for part in _parts(name)) + "$"
        return wr.LinePlot(title=METRICS[name].says.rstrip("."), x="step", metric_regex=pattern)
    said = find(name)
    x = "tokens" if name == "val/gap" else "step"
    return wr.LinePlot(title=said.says.rstrip("."), x=x, y=[name], title_y=said.unit or None)


def _parts(pattern: str) -> list[str]:
    head, _, rest = pattern.partition("{")
    return [head, rest.partition("}")[2]]


def compared() -> list[Any]:
    """Runs beside each other: coordinates from settings to results, what matters, what differs, and the numbers."""
    import wandb_workspaces.reports.v2 as wr

    axes: list[Any] = [*map(wr.Config, SETTINGS), *(wr.SummaryMetric(name) for name in ENDS if find(name))]
    columns = [wr.ParallelCoordinatesPlotColumn(metric=one) for one in axes]
    wide = wr.ParallelCoordinatesPlot(title="Settings and what they reach", columns=columns)
    wide.layout = wr.Layout(x=0, y=0, w=COLUMNS * WIDTH, h=2 * HEIGHT)
    rest = [wr.ParameterImportancePlot(with_respect_to=RESULT), wr.RunComparer(diff_only="split")]
    rest += [wr.ScalarChart(title=find(name).says.rstrip("."), metric=name) for name in ENDS]
    return [wide, *_placed(rest, first=2 * HEIGHT)]


def _placed(panels: list[Any], first: int = 0) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    for i, panel in enumerate(panels):
        panel.layout = wr.Layout(x=i % COLUMNS * WIDTH, y=first + i // COLUMNS * HEIGHT, w=WIDTH, h=HEIGHT)
    return panels
