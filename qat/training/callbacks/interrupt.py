"""Ctrl-C ends training at the next optimizer step, where a checkpoint is exact, instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from typing import Any

import lightning.pytorch as pl


class GracefulInterrupt(pl.Callback):
    """The first SIGINT or SIGTERM asks training to stop; a second SIGINT raises KeyboardInterrupt at once.

    `interrupted` tells afterwards whether it happened.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Handlers can be set in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Give the handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop where the optimizer has just stepped."""
        if self.interrupted and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.should_stop = True

    def _handle(self, number: int, frame: Any) -> None:
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nStopping after this step and saving a checkpoint; Ctrl-C once more stops at once.", flush=True)
