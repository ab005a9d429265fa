"""The bar of a training counts optimizer steps, whatever one takes, and leaves the terminal however the training ends."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from qat.terminal import stage
from qat.training.callbacks.progress import Bar, numbers, progress


def trainer(step: int, **found: float) -> Any:
    module = SimpleNamespace(shown=found)
    return SimpleNamespace(max_steps=20, global_step=step, accumulate_grad_batches=4, lightning_module=module)


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_a_bar_counts_the_steps_that_are_left(
    end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage, "FIRST", 0.01)
    monkeypatch.setattr(stage, "EVERY", 0.05)
    bar = Bar("QAT")
    bar.on_train_start(trainer(12))
    bar.on_train_batch_end(trainer(14, loss=2.5, **{"tok/s": 1761.0}))
    time.sleep(0.15)
    getattr(bar, end)(trainer(14))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "qat: QAT ..." and lines[1] == "qat: QAT: 2 of 8 steps, 0:00 left, loss 2.500, 1,761 tokens/s"
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_numbers_that_are_not_known_yet() -> None:
    assert numbers(trainer(0)) == "" and numbers(trainer(1, loss=2.5)) == "loss 2.500"


def test_a_pipe_gets_lines() -> None:
    assert type(progress("QAT")).__name__ == "Lines"
