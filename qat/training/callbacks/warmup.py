"""Lambda warm-up: blend quantization in over the first steps instead of all at once."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from qat.conversion.layers import set_lambda
from qat.training.schedule import lambda_at


class LambdaWarmup(pl.Callback):
    """Sets lambda = min(step / steps, 1) before each batch: a function of the step, so a resumed run continues it."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Before each batch."""
        set_lambda(module.student, lambda_at(trainer.global_step, self.steps))  # type: ignore[arg-type]

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """What is evaluated and packed is fully quantized."""
        set_lambda(module.student, 1.0)  # type: ignore[arg-type]
