"""Training ends before its last step: only where an optimizer step ends, and with the name of who asked for it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from qat import parallel
from qat.training.callbacks.boundary import step_ends, validates
from qat.training.signals import Signals


class StopAtStep(pl.Callback):
    """A stop that a signal or another callback asked for within an optimizer step waits for the step's end.

    The last step asks for one too: lightning then validates, however many steps ago it did so, and only once.
    """

    def __init__(self, signals: Signals, val_every: int | None) -> None:
        self.signals, self.val_every, self._postponed = signals, val_every, False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """lightning has put a handler of its own before ours by now, which would end the run in the middle of a step."""
        self.signals.listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop where the optimizer has just stepped, all ranks at one step."""
        stops = trainer.should_stop or self._postponed
        if not step_ends(trainer, batch_idx):
            trainer.should_stop, self._postponed = False, stops
            return
        asked = parallel.most(2 * (self.signals.asked or 0) + stops)
        self.signals.asked = self.signals.asked or asked // 2 or None
        trainer.should_stop, self._postponed = asked > 0, False
        due = validates(trainer.global_step, self.val_every, trainer.max_steps)
        if trainer.should_stop and self.signals.asked is not None and not due:
            trainer.limit_val_batches = 0  # lightning would validate once more before it stops
        elif due and trainer.global_step == trainer.max_steps:
            trainer.should_stop = True


class Blame(pl.Callback):
    """Stands right behind `callback` and notes whether training was asked to stop there for the first time."""

    def __init__(self, callback: pl.Callback, found: list[pl.Callback]) -> None:
        self.callback, self.found = callback, found

    def _look(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.should_stop and not self.found:
            self.found.append(self.callback)

    on_fit_start = on_train_start = on_train_epoch_start = on_train_epoch_end = _look  # type: ignore[assignment]
    on_train_batch_start = on_before_optimizer_step = on_before_zero_grad = on_train_batch_end = _look  # type: ignore[assignment]
    on_validation_start = on_validation_batch_end = on_validation_epoch_end = on_validation_end = _look  # type: ignore[assignment]


def words(found: list[pl.Callback]) -> str:
    """Who stopped the training first, and why where it says so."""
    if not found:
        return "a callback"
    callback = found[0]
    why = " ".join(str(getattr(callback, "stopping_reason_message", None) or "").split())
    return f"{type(callback).__name__}: {why}" if why else type(callback).__name__
