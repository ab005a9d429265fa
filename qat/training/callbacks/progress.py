"""How far a training is: a bar in a terminal, a plain line now and then elsewhere; loss, tokens/s and the time left."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

_LINES = 10


def progress(name: str) -> pl.Callback:
    """What fits stdout, under the name `QAT` or `control`: a bar redraws its line, which a file or a pipe would keep."""
    return Bar(name) if sys.stdout.isatty() else Lines(name)


class Bar(TQDMProgressBar):
    """lightning's bar, without its version number."""

    def __init__(self, name: str) -> None:
        super().__init__(refresh_rate=5)
        self.name = name

    def init_train_tqdm(self) -> Tqdm:
        """The bar over all batches of the run. A resumed run starts inside the epoch, so lightning would give it no total."""
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc} {percentage:3.0f}% {bar:20} batch {n_fmt}/{total_fmt}, {remaining} left{postfix}"
        bar.set_description(self.name, refresh=False)
        bar.total = self.total_train_batches
        bar.initial = bar.n = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return bar

    @property
    def total_train_batches(self) -> int | float:
        """Those of the whole run. lightning counts the optimizer steps that are left, each of which may take several batches."""
        return min(self.trainer.num_training_batches, self.trainer.max_steps * self.trainer.accumulate_grad_batches)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """One epoch is the whole run, so its number says nothing."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(self.name)

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """What stands after the bar."""
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        return {**metrics, "tok/s": f"{metrics['tok/s']:,.0f}"} if "tok/s" in metrics else metrics


class Lines(pl.Callback):
    """A line after each tenth of the optimizer steps."""

    def __init__(self, name: str) -> None:
        self.name, self.shown = name, 0
        self.first, self.start = 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """The clock, and where a resumed run goes on."""
        self.first, self.start = trainer.global_step, time.perf_counter()
        self.shown = self._tenth(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Print where another tenth is done."""
        if not trainer.is_global_zero or self._tenth(trainer) == self.shown:
            return
        self.shown = self._tenth(trainer)
        step, found = trainer.global_step, trainer.progress_bar_metrics
        left = (time.perf_counter() - self.start) / (step - self.first) * (trainer.max_steps - step)
        numbers = [f"loss {found['loss']:.3f}"] if "loss" in found else []
        numbers += [f"{found['tok/s']:,.0f} tokens/s"] if "tok/s" in found else []
        print(", ".join([f"{self.name} step {step}/{trainer.max_steps}", *numbers, f"{_clock(left)} left"]), flush=True)

    @staticmethod
    def _tenth(trainer: pl.Trainer) -> int:
        return trainer.global_step * _LINES // trainer.max_steps


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
