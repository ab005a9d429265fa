"""trackio, the local-first tracker: SQLite on this machine, a page on 127.0.0.1 by `trackio show`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from qat.training.loggers.pictures import result_rows
from qat.training.loggers.record import About, Ended, Sink, measured


class TrackioLogger(Logger):
    """lightning's interface to trackio. A run is known by its name there, so a name should be one run's alone.

    Rows are at trackio's own step, which is the optimizer's. Other arguments are `trackio.init`'s.
    """

    def __init__(self, project: str = "qat", name: str | None = None, save_dir: str | None = None, **options: Any) -> None:
        super().__init__()
        self._project, self._name, self._options, self._config = project, name, options, dict[str, Any]()
        self._run: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """trackio's run, made when it is first asked for: its configuration cannot be told later."""
        if self._run is None:
            import trackio

            usual = {"resume": "allow", "embed": False, "auto_log_cpu": False}
            self._run = trackio.init(self._project, name=self._name, config=self._config, **{**usual, **self._options})
        return self._run

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The run's name."""
        return self._name

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """The run's configuration, if it is told before the first row."""
        self._config |= dict(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """A row; what the step did not measure is left out."""
        if kept := measured(metrics):
            self.experiment.log(kept, step=step)


def _options(about: About) -> dict[str, Any]:
    return {"name": f"{about.name} {about.id[:6]}", **({"group": about.group} if about.group else {})}


def _begin(logger: TrackioLogger, about: About) -> None:
    logger.log_hyperparams({**about.everything, "tags": about.tags, "job_type": about.job_type})
    _ = logger.experiment


def _histograms(logger: TrackioLogger, found: dict[str, Any], step: int) -> None:
    import trackio

    logger.experiment.log({name: trackio.Histogram(np_histogram=one) for name, one in found.items()}, step=step)


def _alert(logger: TrackioLogger, title: str, text: str, step: int) -> None:
    logger.experiment.alert(title=title, text=text)


def _end(logger: TrackioLogger, ended: Ended) -> None:
    import pandas
    import trackio

    rows = pandas.DataFrame(result_rows(ended.numbers), columns=["name", "value", "unit", "says"])
    logger.experiment.log({**ended.numbers, "result/table": trackio.Table(dataframe=rows)}, step=ended.step)
    logger.experiment.finish()


SINK = Sink(options=_options, begin=_begin, histograms=_histograms, alert=_alert, end=_end)
