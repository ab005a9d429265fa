"""Trackers of a run beside metrics.csv: which there are, and all of one run's from its start to its result.

They live as long as the run does, not as long as the fit: what a person compares runs by (perplexities, sizes, proofs) is known
last. A tracker that fails then costs the run nothing but a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hydra.utils import get_object
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import nn

from qat.config import TrainConfig
from qat.monitor.histograms import latent_histograms
from qat.monitor.table import result_metrics
from qat.reporting.result import read_result
from qat.training.loggers import mlflow, tensorboard, trackio, weights_and_biases
from qat.training.loggers.identity import keep
from qat.training.loggers.record import About, Ended, Sink
from qat.training.loggers.trackio import TrackioLogger

SINKS: dict[Any, Sink] = {
    WandbLogger: weights_and_biases.SINK,
    TrackioLogger: trackio.SINK,
    TensorBoardLogger: tensorboard.SINK,
    MLFlowLogger: mlflow.SINK,
}
"""Class that a configuration names -> what is done with it; any other of lightning's gets the configuration and the numbers."""

Make = Callable[[dict[str, Any]], Any]


def sink_of(kind: Any) -> Sink:
    """The record of a class; that of any logger where the table has none."""
    return SINKS.get(kind, Sink())


@dataclass
class Trackers:
    """Those of a run. They are made by `open`, and told the result when `tracked` ends."""

    made: list[tuple[Logger, Sink]] = field(default_factory=list)
    about: About | None = None
    step: int = 0

    @property
    def loggers(self) -> list[Logger]:
        """For lightning's trainer."""
        return [logger for logger, _ in self.made]

    def open(self, config: TrainConfig, about: About, make: Make) -> None:
        """Make all that the configuration names by `make`, and tell them about the run.

        Raises:
            ValueError: one cannot be made, or cannot begin.
        """
        self.about = about
        for name, node in config.logger.items():
            sink = sink_of(get_object(node["_target_"]))
            logger = make(_filled(node, sink, about))
            self.made.append((logger, sink))
            try:
                sink.begin(logger, about)
            except Exception as error:  # whatever another's library raises where it cannot reach its server or its file
                raise ValueError(f"logger.{name} cannot begin: {' '.join(str(error).split())}") from error
            about = self.about = keep(about, sink.keeps(logger))

    def histograms(self, model: nn.Module, step: int) -> None:
        """Show the latent weights as they are at a step."""
        self.step = step
        made = latent_histograms(model) if self.made else {}
        found = {f"latents/{family}": (one.counts, one.edges) for family, one in made.items()}
        for logger, sink in self.made:
            sink.histograms(logger, found, step)

    def close(self) -> None:
        """Tell the result and end all of them."""
        if self.about is None or (result := read_result(self.about.folder)) is None:
            return
        numbers = result_metrics(result.to_dict())
        if result.objective is not None:
            numbers["result/objective"] = result.objective
        for logger, sink in self.made:
            try:
                sink.end(logger, Ended(self.about, result, self.step, numbers))
            except Exception as error:  # of another's library, when the run is over
                print(f"{type(logger).__name__}: the result could not be logged: {' '.join(str(error).split())}", flush=True)


def _filled(node: dict[str, Any], sink: Sink, about: About) -> dict[str, Any]:
    """The node with the run's own values where it says nothing, and the class that is made in place of lightning's."""
    said = {key: value for key, value in node.items() if value is not None}
    target = {} if sink.make is None else {"_target_": f"{sink.make.__module__}.{sink.make.__qualname__}"}
    return {"save_dir": str(about.folder), **sink.options(about), **said, **target}


def alert(loggers: list[Any], title: str, text: str, step: int) -> None:
    """Send an alarm to those of lightning's loggers that can show one."""
    for logger in loggers:
        made = next((sink for kind, sink in SINKS.items() if isinstance(logger, kind)), Sink())
        made.alert(logger, title, text, step)


@contextmanager
def tracked() -> Iterator[Trackers]:
    """Trackers that are closed at the end, whatever ends the run; around the recording, so that the result is written by then."""
    trackers = Trackers()
    try:
        yield trackers
    finally:
        trackers.close()
