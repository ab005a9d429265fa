"""Whole steps on a GPU while torch refuses every call that waits for it; test_no_waiting.py has the same where there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_no_waiting import quiet

from qat.config import TrainConfig
from qat.train import run
from qat.training import run as running

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


class Begin(pl.Callback):
    """Forbids waiting in steps that write nothing, but for the first, which loads kernels and allocates."""

    def __init__(self, every: int) -> None:
        self.every, self.steps = every, 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step > 0 and (trainer.global_step + 1) % self.every:
            self.steps += 1
            torch.cuda.set_sync_debug_mode("error")


class End(pl.Callback):
    """Allows it again when the step is over."""

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def begin(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """In the training that is run: before all callbacks of a step, and after them."""
    found, original = Begin(5), pl.Trainer.__init__

    def made(self: Any, *args: Any, callbacks: Any, **more: Any) -> None:
        original(self, *args, callbacks=[found, *callbacks, End()], **more)

    monkeypatch.setattr(pl.Trainer, "__init__", made)
    yield found
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(config: TrainConfig) -> TrainConfig:
    config.trainer = replace(config.trainer, accelerator="gpu", precision="bf16-mixed")
    return config


@pytest.mark.parametrize("ce", [1.0, 0.5], ids=["cross-entropy", "distilled"])
def test_a_step_waits_for_nothing(config: TrainConfig, begin: Begin, ce: float) -> None:
    run(on_gpu(quiet(config, ce=ce, kl=1 - ce)))
    assert begin.steps >= 8


def test_one_that_waits_is_found(config: TrainConfig, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
            next(module.parameters()).sum().item()

    monkeypatch.setattr(running, "callbacks", lambda config: [Reader()])
    with pytest.raises(RuntimeError, match="synchroniz"):
        run(on_gpu(quiet(config, ce=1.0)))
