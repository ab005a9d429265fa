"""Tokens and seconds of training, without validation, and tokens/s in the progress bar."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl


class Throughput(pl.Callback):
    """Counts `tokens` on all devices and `seconds`, across resumes, leaving out the time spent validating."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._start: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """The clock runs from the first batch, and again after each validation."""
        if self._start is None:
            self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log the rate."""
        now = time.perf_counter()
        assert self._start is not None
        self.seconds += now - self._start
        self._start = now
        self.tokens += batch["input_ids"].numel() * trainer.world_size
        module.log("train/tokens_per_second", self.tokens_per_second, prog_bar=False)
        module.log("tok/s", float(round(self.tokens_per_second)), prog_bar=True, logger=False)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._start = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on a second of training."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Called by lightning when it saves."""
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by lightning when it resumes."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]
