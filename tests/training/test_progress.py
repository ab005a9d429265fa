"""The progress bar counts batches, whatever an optimizer step takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from qat.training.callbacks.progress import Bar


@pytest.mark.parametrize(("step", "batches", "total"), [(0, float("inf"), 80), (12, float("inf"), 80), (0, 50, 50)])
def test_a_bar_with_accumulation(step: int, batches: float, total: int, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("QAT")
    bar._trainer = SimpleNamespace(  # type: ignore[assignment]
        max_steps=20, global_step=step, accumulate_grad_batches=4, num_training_batches=batches
    )
    shown = bar.init_train_tqdm()
    assert (shown.total, shown.n, shown.initial) == (total, 4 * step, 4 * step) and shown.desc == "QAT: "
    shown.close()


def test_the_bar_counts_whole_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TQDMProgressBar, "get_metrics", lambda *_: {"v_num": 1, "loss": "2.5", "tok/s": 1761.0})
    assert Bar("QAT").get_metrics(None, None) == {"loss": "2.5", "tok/s": "1,761"}  # type: ignore[arg-type]
