"""Alarms of a training: rules are asked after every row and look; what is new is said once, until it has cleared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np

from qat.conversion.layers import parameter_count
from qat.monitor.alarms import Alarm, AlarmsFile, read_alarms
from qat.monitor.layers import read_layers
from qat.monitor.rules import LASTING, Facts, Finding, History, findings
from qat.reporting.rates import fine_tuning_rate
from qat.terminal.lines import wrapped
from qat.training.callbacks.boundary import step_ends
from qat.training.callbacks.guard import NonFiniteError
from qat.training.callbacks.metrics_file import read_rows, trained
from qat.training.loggers import alert
from qat.training.monitoring.speed import passes_after

if TYPE_CHECKING:
    from qat.config import TrainConfig
    from qat.training.module import QATModule
    from qat.training.monitoring.looks import Monitor

_LOOKS = 4
_HELD_OUT = ("val/", "optim/grad_norm/")


def facts_of(config: TrainConfig, passes: float, module: QATModule) -> Facts:
    """What the rules must know of a run."""
    optim, trainer = config.optim, config.trainer
    return Facts(
        steps=trainer.max_steps,
        settled=max(optim.lambda_steps, optim.rms_norm_steps, optim.warmup(trainer.max_steps)),
        held=optim.held_from(trainer.max_steps),
        lr=optim.peak,
        usual=optim.lr_multiple * fine_tuning_rate(parameter_count(module.student)),
        latent_lr_multiplier=optim.latent_lr_multiplier,
        weight_decay=optim.weight_decay,
        clip=trainer.gradient_clip_val,
        passes=passes,
        act_bits=config.quant.act_bits,
        rotated=config.quant.act_hadamard,
        scale=config.quant.scale,
        weights=module.weights_at,
    )


class Alarming(pl.Callback):
    """Raises alarms in the terminal, in loggers that can show them, and in the run's alarms.jsonl.

    It stands behind whatever fills the step's row, and before who writes it. A run that goes on reads what it has shown from its
    own files, so that its alarms are those of an undisturbed one.
    """

    def __init__(self, folder: Path, config: TrainConfig, monitor: Monitor) -> None:
        self.folder, self.config, self.monitor = folder, config, monitor
        self.every = min(config.trainer.log_every_n_steps, config.trainer.max_steps)

    def on_train_start(self, trainer: pl.Trainer, module: QATModule) -> None:  # type: ignore[override]
        """What the run has shown before."""
        step = trainer.global_step
        self.facts = facts_of(self.config, passes_after(trainer, self.config.trainer.max_steps), module)
        self.file = AlarmsFile(self.folder, step or None)
        self.active = {(one.kind, one.where): one for one in read_alarms(self.folder) if one.until is None}
        kept = read_rows(self.folder / "metrics.csv")[0] if step else []
        self.rows = [{key: float(value) for key, value in row.items()} for row in kept]
        looks = read_layers(self.folder) if step else {}
        self.gradients = [*looks["grad_norm"][looks["step"] > 0]][-_LOOKS:] if looks else []

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: QATModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a row, or a look."""
        step = trainer.global_step
        if not step_ends(trainer, batch_idx) or (step % self.every and step % self.monitor.every):
            return
        if step % self.monitor.every == 0 and self.monitor.layers:
            self.gradients = [*self.gradients, self.monitor.latest["grad_norm"]][-_LOOKS:]
        self._ask(trainer, module, {**module.row, **(trained(trainer) if step % self.every == 0 else {})})

    def on_validation_end(self, trainer: pl.Trainer, module: QATModule) -> None:  # type: ignore[override]
        """After a validation."""
        if not trainer.sanity_checking:
            found = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(_HELD_OUT)}
            self._ask(trainer, module, found)

    def _ask(self, trainer: pl.Trainer, module: QATModule, row: dict[str, float]) -> None:
        step = trainer.global_step
        self.rows.append({"step": float(step), **{key: value for key, value in row.items() if not np.isnan(value)}})
        gradients = np.stack(self.gradients) if self.gradients else np.zeros((0, len(self.monitor.families)))
        found = findings(History(self.rows, self.facts, gradients, self.monitor.families))
        for place in [one for one in self.active if one not in found]:
            self.file.cleared(self.active.pop(place), step)
        diverged = any(kind == "divergence" for kind, _ in found)
        for place, finding in found.items():
            if place not in self.active and (place[0] in LASTING or not diverged):
                self._raise(trainer, module, place[0], finding, step)

    def _raise(self, trainer: pl.Trainer, module: pl.LightningModule, kind: str, found: Finding, step: int) -> None:
        alarm = Alarm(step, kind, found.text, found.key, found.where)
        self.active[kind, found.where] = alarm
        self.file.raised(alarm)
        module.print(wrapped(f"alarm, {alarm.line}"), flush=True)
        alert(trainer.loggers, kind.replace("_", " "), alarm.line, alarm.step)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """What is not finite ends a run, and is its last alarm."""
        if isinstance(exception, NonFiniteError) and hasattr(self, "file"):
            text = f"{exception}".partition(". ")[0]
            self._raise(trainer, module, "divergence", Finding(text, self.facts.slower), exception.step)
