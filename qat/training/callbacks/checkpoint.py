"""checkpoints/last.ckpt, written whole or not at all, at optimizer-step boundaries only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Checkpoint(pl.Callback):
    """Saves every `every` optimizer steps, at the last step, and where another callback has asked training to stop.

    lightning's ModelCheckpoint writes in place, so a full disk would destroy the last good file, and it does not save
    when training is stopped early.
    """

    def __init__(self, file: Path, every: int | None) -> None:
        self.file, self.every = file, every

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between accumulated batches nothing is saved: gradients are no part of a checkpoint."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        if trainer.should_stop or step == trainer.max_steps or (self.every is not None and step % self.every == 0):
            save(trainer, self.file)


def save(trainer: pl.Trainer, file: Path) -> None:
    """Write a checkpoint beside `file`, then rename it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    try:
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, file)
    finally:
        if trainer.is_global_zero:
            temporary.unlink(missing_ok=True)
