"""The progress bar: loss, tokens/s and time left, without lightning's version number."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class Progress(TQDMProgressBar):
    """lightning's bar under a name of its own: `QAT` or `control`."""

    def __init__(self, name: str) -> None:
        super().__init__(refresh_rate=5)
        self.name = name

    def init_train_tqdm(self) -> Tqdm:
        """The bar over all batches of the run."""
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc} {percentage:3.0f}% {bar:20} batch {n_fmt}/{total_fmt}, {remaining} left{postfix}"
        return bar

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """One epoch is the whole run, so its number says nothing."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(self.name)

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """What stands after the bar."""
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        return metrics
