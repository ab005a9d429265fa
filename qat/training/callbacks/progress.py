"""How far a training is: a stage's bar in a terminal, a plain line now and then elsewhere; loss, tokens/s and the time left."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl

from qat.terminal.stage import Stage, clock, in_terminal, stage

_LINES = 10


def progress(name: str) -> pl.Callback:
    """What fits, under the name `QAT` or `control`: a bar where both outputs are the terminal, lines on stdout elsewhere."""
    return Bar(name) if sys.stdout.isatty() and in_terminal() else Lines(name)


def numbers(trainer: pl.Trainer) -> str:
    """`loss 2.514, 1,761 tokens/s`, as far as they are known."""
    module: Any = trainer.lightning_module
    found = module.shown
    words = [f"loss {found['loss']:.3f}"] if "loss" in found else []
    return ", ".join(words + ([f"{found['tok/s']:,.0f} tokens/s"] if "tok/s" in found else []))


class Bar(pl.Callback):
    """A stage that counts optimizer steps, and one for each validation."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._open, self._validation = ExitStack(), ExitStack()
        self._steps: Stage | None = None
        self._first = 0

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """A resumed run counts what this part of it has to do: the time left is of that."""
        self._first = trainer.global_step
        self._steps = self._open.enter_context(stage(self.name, trainer.max_steps - self._first, "steps"))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Steps, and what was measured of them."""
        assert self._steps is not None
        self._steps.done, self._steps.remark = trainer.global_step - self._first, numbers(trainer)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """A line of its own."""
        self._validation.enter_context(stage("validating"))

    def on_validation_end(self, *_: Any) -> None:
        """It goes."""
        self._validation.close()

    def on_train_end(self, *_: Any) -> None:
        """The bar goes; what it said is in metrics.csv."""
        self._open.close()

    def on_exception(self, *_: Any) -> None:
        """A terminal is left as it was found."""
        self._validation.close()
        self._open.close()


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
        step = trainer.global_step
        left = (time.perf_counter() - self.start) / (step - self.first) * (trainer.max_steps - step)
        found = [words] if (words := numbers(trainer)) else []
        print(", ".join([f"{self.name} step {step}/{trainer.max_steps}", *found, f"{clock(left)} left"]), flush=True)

    @staticmethod
    def _tenth(trainer: pl.Trainer) -> int:
        return trainer.global_step * _LINES // trainer.max_steps
