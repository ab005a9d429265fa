"""MLflow through lightning's logger: one store for all runs, which `mlflow ui` shows."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch.loggers import MLFlowLogger

from qat.training.loggers.record import About, Ended, OnlyMeasured, Sink

NAME = "mlflow"


class MLflow(OnlyMeasured, MLFlowLogger):  # type: ignore[misc]
    """lightning's."""


def _options(about: About) -> dict[str, Any]:
    said = {"group": about.group, "job_type": about.job_type, "tags": ",".join(about.tags), **about.facts}
    tags = {key: str(value) for key, value in said.items() if value and not isinstance(value, dict)}
    return {"run_name": about.name, "tags": {**tags, "qat.id": about.id}, "run_id": about.known.get(NAME)}


def _begin(logger: MLflow, about: About) -> None:
    """A parameter cannot change there: what a resumed run has changed becomes a tag."""
    if NAME not in about.known:
        logger.log_hyperparams(about.everything)
        return
    before = logger.experiment.get_run(logger.run_id).data.params
    for key, value in _flatten_dict(about.everything).items():
        if key in before and not key.startswith("about/") and str(value)[:250] != before[key]:
            logger.experiment.set_tag(logger.run_id, f"resumed.{key.replace('/', '.')}", str(value))


def _keeps(logger: MLflow) -> dict[str, str]:
    return {NAME: str(logger.run_id)}


def _alert(logger: MLflow, title: str, text: str, step: int) -> None:
    logger.experiment.set_tag(logger.run_id, f"alarm.{step}.{title}", text)


def _end(logger: MLflow, ended: Ended) -> None:
    logger.log_metrics(ended.numbers, ended.step)
    logger.experiment.set_tag(logger.run_id, "status", ended.result.status)
    logger.finalize("failed" if ended.failed else "success")


SINK = Sink(make=MLflow, options=_options, begin=_begin, keeps=_keeps, alert=_alert, end=_end)
