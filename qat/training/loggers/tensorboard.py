"""TensorBoard, with a page of its own (custom scalars) that is laid out by the table of metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from qat.monitor.table import METRICS, SECTIONS
from qat.training.loggers.record import About, Ended, OnlyMeasured, Sink


class TensorBoard(OnlyMeasured, TensorBoardLogger):  # type: ignore[misc]
    """lightning's."""


def layout() -> dict[str, dict[str, list[Any]]]:
    """Section -> chart -> the names that it draws, as custom scalars have it; a pattern's families share a chart."""
    found: dict[str, dict[str, list[Any]]] = {}
    for name, metric in METRICS.items():
        if metric.section and metric.section != "result" and not name.endswith("/{term}"):
            pattern = "^" + name.replace("{family}", "[^/]+").replace("{group}", "[^/]+") + "$"
            found.setdefault(SECTIONS[metric.section], {})[metric.says] = ["Multiline", [pattern]]
    return found


def _begin(logger: TensorBoard, about: About) -> None:
    logger.log_hyperparams(about.everything)
    logger.experiment.add_custom_scalars(layout())
    logger.experiment.add_text("about", "\n".join(f"    {key}: {value}" for key, value in about.facts.items()), 0)


def _histograms(logger: TensorBoard, found: dict[str, Any], step: int) -> None:
    for name, (counts, edges) in found.items():
        centers, total = (edges[1:] + edges[:-1]) / 2, counts.sum()
        sums = (counts * centers).sum(), (counts * np.square(centers)).sum()
        limits = edges[1:].tolist()
        logger.experiment.add_histogram_raw(name, edges[0], edges[-1], total, *sums, limits, counts.tolist(), step)


def _alert(logger: TensorBoard, title: str, text: str, step: int) -> None:
    logger.experiment.add_text("alarms", f"**{title}** {text}", step)


def _end(logger: TensorBoard, ended: Ended) -> None:
    logger.log_metrics(ended.numbers, ended.step)
    logger.experiment.add_text("result/status", ended.result.status, ended.step)
    logger.finalize("failed" if ended.failed else "success")


SINK = Sink(make=TensorBoard, begin=_begin, histograms=_histograms, alert=_alert, end=_end)
