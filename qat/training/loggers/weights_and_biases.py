"""Weights & Biases: offline unless told otherwise; `wandb sync` uploads later, and continues the run that a resume continued."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from qat.reporting.dashboard.key import has_key
from qat.training.loggers.pictures import heat_maps, packed_folder, result_rows
from qat.training.loggers.record import About, Ended, Sink, measured

AXES = ("step", "tokens")
_OFFLINE = ("offline", "dryrun", "disabled")


class Wandb(WandbLogger):
    """lightning's, with `step` as the x axis and in each row, and `artifact`: whether the packed model is uploaded too.

    W&B's own count is the optimizer step as well, so rows of a resumed run come after those from before, also where both parts
    were written offline and are synchronised later. `offline` is said to W&B itself: lightning leaves it in the environment,
    which is read once a process, and perhaps was.
    """

    def __init__(self, *args: Any, artifact: bool = False, **kwargs: Any) -> None:
        if kwargs.get("offline"):
            kwargs.setdefault("mode", "offline")
        super().__init__(*args, **kwargs)
        self.artifact = artifact

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """As lightning's; what a step did not measure is left out."""
        at = {} if step is None else {"step": step}
        if kept := measured(metrics):
            self.experiment.log({**kept, **at}, step=step)


def _check(key: str, node: Mapping[str, Any]) -> None:
    mode = node.get("mode") or os.environ.get("WANDB_MODE")
    if node.get("offline") or mode in _OFFLINE:
        return
    if not has_key():
        raise ValueError(
            f"{key}.offline=false needs a key of Weights & Biases, and there is none; run `wandb login`, set WANDB_API_KEY, or"
            f" leave {key}.offline=true and run `wandb sync` later"
        )


def _options(about: About) -> dict[str, Any]:
    found = {"name": about.name, "id": about.id, "group": about.group, "job_type": about.job_type, "tags": about.tags}
    return {**found, "notes": about.facts.get("command")}


def _begin(logger: Wandb, about: About) -> None:
    run = logger.experiment
    for axis in AXES:
        run.define_metric(axis)
    run.define_metric("*", step_metric=AXES[0], step_sync=True)
    logger.log_hyperparams(about.everything)


def _histograms(logger: Wandb, found: dict[str, Any], step: int) -> None:
    import wandb

    drawn = {name: wandb.Histogram(np_histogram=one) for name, one in found.items()}
    logger.experiment.log({**drawn, "step": step}, step=step)


def _alert(logger: Wandb, title: str, text: str, step: int) -> None:
    logger.experiment.alert(title=title, text=text)


def _end(logger: Wandb, ended: Ended) -> None:
    import wandb

    run = logger.experiment
    table = wandb.Table(columns=["name", "value", "unit", "says"], data=result_rows(ended.numbers))
    pictures = {name: wandb.Plotly(one) for name, one in heat_maps(ended.about.folder).items()}
    step = max(ended.step, run.step)  # of a failed run the last that was logged: W&B drops rows of earlier ones
    run.log({"result/table": table, **pictures, "step": step}, step=step)
    run.summary.update({**ended.numbers, "result/status": ended.result.status})
    if logger.artifact and (packed := packed_folder(ended.about.folder)) is not None:
        verified = {"verification": ended.result.verification, "bytes": ended.result.bytes, "status": ended.result.status}
        artifact = wandb.Artifact(f"packed-{ended.about.id}", type="model", metadata=verified)
        artifact.add_dir(str(packed))
        run.log_artifact(artifact)
    run.finish(exit_code=int(ended.failed))


SINK = Sink(make=Wandb, options=_options, check=_check, begin=_begin, histograms=_histograms, alert=_alert, end=_end)
