"""Soft codes that harden over the run: `qat.quantizers.soft` with the sharpness of `qat.training.schedule.beta_at`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from qat.config import OptimConfig
from qat.conversion.layers import set_beta
from qat.training.schedule import beta_at


class Anneal(pl.Callback):
    """Sets beta before each batch: a function of the step, so a resumed run continues it.

    Outside of training steps codes are hard: what is validated, sampled, packed, or left behind by an error is what is deployed.
    """

    def __init__(self, optim: OptimConfig, total: int) -> None:
        self.optim, self.total = optim, total

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Before each batch."""
        optim = self.optim
        beta = beta_at(trainer.global_step, self.total, optim.anneal_from, optim.anneal_to, optim.anneal_share)
        set_beta(module.student, beta)  # type: ignore[arg-type]

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Until the next batch of the training."""
        set_beta(module.student, None)  # type: ignore[arg-type]

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Also where a signal or a callback has ended it."""
        set_beta(module.student, None)  # type: ignore[arg-type]

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """For whoever looks at the model then."""
        set_beta(module.student, None)  # type: ignore[arg-type]
