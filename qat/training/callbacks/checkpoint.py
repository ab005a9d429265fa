"""When checkpoints are written: at optimizer-step boundaries only, after the step's rows and its validation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from qat import parallel
from qat.config import TrainerConfig
from qat.training.callbacks.boundary import step_ends, validates
from qat.training.checkpoints import WholeFiles, save
from qat.training.release.best import moved


class Checkpoint(pl.callbacks.Checkpoint):
    """Saves every checkpoint_every steps and checkpoint_minutes, at the last step, and where training has been asked to stop.

    lightning's ModelCheckpoint writes in place, so a full disk would destroy the last good file, and it does not save
    when training is stopped early. It stands last among the callbacks, to see what the others ask for; as one of lightning's
    kind also behind ModelCheckpoints, which that puts at the end, so that the file knows which step they found best.
    """

    def __init__(self, folder: Path, config: TrainerConfig) -> None:
        self.folder, self.config = folder, config
        self._due, self._time = False, time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The clock runs from here, not from the loading of the model."""
        self._time = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between accumulated batches nothing is saved: gradients are no part of a checkpoint.

        Who stops a run before its last step may not wait for the validation: then there is a file before it, and one after it.
        """
        if not step_ends(trainer, batch_idx):
            return
        step, last = trainer.global_step, trainer.max_steps
        early = trainer.should_stop and step < last
        follows = trainer.enable_validation and (early or validates(step, self.config.val_every, last))
        due = early or self._is_due(step, last)
        if due and (early or not follows):
            self._save(trainer)
        self._due = due and follows

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """A checkpoint that is due at a validation waits for it, as a resumed run would not make that validation again."""
        if self._due or trainer.should_stop:
            self._save(trainer)

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """What ModelCheckpoints keep lies where the run's folder is now."""
        states = checkpoint.get("callbacks", {})
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, pl.callbacks.ModelCheckpoint) and callback.state_key in states and callback.dirpath:
                states[callback.state_key] = moved(states[callback.state_key], str(callback.dirpath))

    def _is_due(self, step: int, last: int) -> bool:
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        in_time = minutes is not None and parallel.together(time.monotonic() - self._time >= 60 * minutes)
        return step == last or in_time or (every is not None and step % every == 0)

    def _save(self, trainer: pl.Trainer) -> None:
        save(trainer, self.folder)
        if isinstance(trainer.strategy.checkpoint_io, WholeFiles):
            trainer.strategy.checkpoint_io.remove_unwanted()
        self._due, self._time = False, time.monotonic()
