"""Tokens and seconds of training, without validation, and tokens/s of the steps since the last row of metrics.csv."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch

from qat import parallel
from qat.training.callbacks.boundary import step_ends


class Throughput(pl.Callback):
    """Counts `tokens` on all devices and `seconds`, across resumes, leaving out the time spent validating.

    Both the count and the rate go into `row`, that of the step in metrics.csv.
    """

    def __init__(self, every: int, row: dict[str, float]) -> None:
        self.every, self.row = every, row
        self.tokens, self.seconds = 0, 0.0
        self._own = 0
        """Tokens of this rank that `tokens` does not hold yet."""
        self._start: float | None = None
        self._window = (0, 0.0)  # tokens and seconds when the last row was written

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
        self._own += batch["input_ids"].numel()
        due = step_ends(trainer, batch_idx) and trainer.global_step % self.every == 0
        if due:
            self.settle()
        rate = self._rate()
        module.shown["tok/s"] = float(round(rate))  # type: ignore[index,operator]
        if due:
            module.show("tok/s", float(round(rate)))  # type: ignore[operator]
            self.row |= {"tokens": self.tokens, "speed/tokens_per_second": rate}
            self._window = (self.tokens, self.seconds)

    def settle(self) -> None:
        """Count what all ranks have done so far; all of them call it, and batches of some kinds have other sizes on each."""
        self.tokens += int(parallel.sums([torch.tensor(self._own)])[0])
        self._own = 0

    def _rate(self) -> float:
        """Between rows other ranks are taken to do as much as this one."""
        tokens = self.tokens + self._own * parallel.size() - self._window[0]
        seconds = self.seconds - self._window[1]
        return tokens / seconds if seconds else 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The first window begins here, also where a checkpoint brought counts."""
        self._window = (self.tokens, self.seconds)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._start = None

    def state_dict(self) -> dict[str, Any]:
        """Called by lightning when it saves."""
        self.settle()
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by lightning when it resumes."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]
