"""What a tracker is to a run: what it is made with, told at the start, shown, and told at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.reporting.result import RunResult


@dataclass(frozen=True)
class About:
    """What is known of a run before it trains; each tracker takes of it what it has a place for."""

    id: str
    """Its own, kept in its folder, so that a resumed run continues where it was tracked."""
    name: str
    folder: Path
    group: str | None = None
    """The sweep that it is a job of."""
    job_type: str = "train"
    tags: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    """Tracker -> the id that it gave the run itself."""
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """Command, commit, versions, the model's."""

    @property
    def everything(self) -> dict[str, Any]:
        """The configuration, and under `about` what else a comparison of runs asks for."""
        return {**self.config, "about": self.facts}


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    about: About
    result: RunResult
    step: int
    numbers: dict[str, float]
    """`result/...` -> each number of result.json."""

    @property
    def failed(self) -> bool:
        """Whether an error ended it."""
        return self.result.status.startswith("failed")


def _nothing(*_: Any) -> None:
    """For what a tracker has no place for."""


def _hyperparameters(logger: Any, about: About) -> None:
    logger.log_hyperparams(about.everything)


def _numbers(logger: Any, ended: Ended) -> None:
    logger.log_metrics(ended.numbers, ended.step)
    logger.finalize("failed" if ended.failed else "success")
    finish = getattr(getattr(logger, "experiment", None), "finish", None)
    if callable(finish):
        finish()


@dataclass(frozen=True)
class Sink:
    """A tracker. The functions get the logger first; what is left out serves any of lightning's."""

    make: type | None = None
    """The class that is made in place of lightning's; None: the one that is named."""
    options: Callable[[About], dict[str, Any]] = lambda about: {}
    """Arguments that are passed where the configuration does not say them."""
    check: Callable[[str, Mapping[str, Any]], None] = _nothing
    """Raises ValueError for a node, with its key, that cannot work."""
    begin: Callable[[Any, About], None] = _hyperparameters
    keeps: Callable[[Any], dict[str, str]] = lambda logger: {}
    """Tracker -> the id that it gave the run, to be kept in the folder."""
    histograms: Callable[[Any, dict[str, Any], int], None] = _nothing
    """Takes name -> (counts, edges) as numpy has them, and the step."""
    alert: Callable[[Any, str, str, int], None] = _nothing
    """Takes a title, a text and the step."""
    end: Callable[[Any, Ended], None] = _numbers


def measured(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Without NaN, which says that a step did not measure it."""
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


class OnlyMeasured:
    """Before one of lightning's loggers: what a step did not measure is left out of its row, as metrics.csv leaves it out."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """As lightning's."""
        if kept := measured(metrics):
            super().log_metrics(kept, step)  # type: ignore[misc]
