"""A loss and a callback of one's own, in as many files as docs/contributing.md says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qat import losses
from qat.config import DistillConfig, ModelConfig, OptimConfig, TrainConfig
from qat.config.compose.targets import check_targets
from qat.data.order import STEP_TOKENS
from qat.losses.record import Loss, Pair, Seen
from qat.training.module import QATModule
from qat.training.trainings import check_teacher, load_teacher

ROOT = Path(__file__).resolve().parents[2]


def last(seen: Seen, distill: DistillConfig) -> Pair:
    """What losses/last.py would hold: the mean square distance of the last hidden states, a sum over predicted tokens."""
    mine, theirs = (outputs.hidden_states[-1][:, :-1][seen.predicts] for outputs in (seen.student, seen.teacher))
    return (mine - theirs).square().mean(-1).sum(), seen.targets.numel()


@dataclass
class WithLast(DistillConfig):
    """What config/losses.py would hold; the fourth file is conf/distill/last.yaml."""

    last: float = 0.0


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.LOSSES, "last", Loss(last, weight="last", teacher=True, hidden_states=True))


def module(folder: Path, distill: DistillConfig) -> QATModule:
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.0) for _ in range(2))
    with torch.no_grad():
        student.model.norm.weight.mul_(1.5)
    return QATModule(student, distill, OptimConfig(), torch.optim.SGD, 1, teacher)


def test_a_loss_of_one_s_own(row: None, tiny_model: Path) -> None:
    made = module(tiny_model, WithLast(last=2.0))
    labels = torch.randint(4, 30, (2, 8))
    labels[0, :5] = -100
    batch = {"input_ids": labels.clamp_min(4), "labels": labels}
    pairs = made.pairs(batch)
    total, count = pairs["last"]
    with torch.no_grad():
        mine, theirs = (m(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[-1] for m in models(made))
    rows = (mine - theirs)[:, :-1][labels[:, 1:] != -100]
    assert count == len(rows) == 10
    torch.testing.assert_close(total, rows.square().mean(-1).sum())
    made._trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, log_every_n_steps=10)  # type: ignore[assignment]
    made.log = made.log_dict = lambda *_, **__: None  # type: ignore[assignment,method-assign]
    loss = made.training_step({**batch, STEP_TOKENS: 10}, 0)
    torch.testing.assert_close(loss, pairs["ce"][0] / 10 + 2.0 * total / 10)


def models(made: QATModule) -> tuple[Any, Any]:
    assert made._teacher is not None
    return made.student, made._teacher.module


def test_hidden_states_are_asked_for_where_a_row_needs_them(row: None, tiny_model: Path) -> None:
    assert module(tiny_model, WithLast(last=1.0))._asked == {"output_hidden_states": True}
    assert module(tiny_model, WithLast())._asked == {}


def test_a_teacher_is_loaded_where_a_row_needs_one(row: None, tiny_model: Path) -> None:
    config, base = TrainConfig(model=ModelConfig(path=str(tiny_model))), AutoModelForCausalLM.from_pretrained(tiny_model)
    assert load_teacher(replace(config, distill=WithLast()), base) is None
    assert load_teacher(replace(config, distill=WithLast(last=1.0)), base) is base
    off = replace(config, distill=WithLast(last=1.0), model=ModelConfig(path=str(tiny_model), teacher="off"))
    with pytest.raises(ValueError, match=r"distill.last=1.0 needs a teacher, but model.teacher=off"):
        check_teacher(off)


CALLBACK = '''"""Prints the learning rate."""

import lightning.pytorch as pl


class PrintsRate(pl.Callback):
    """After each batch."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Print it."""
        print("rate after step", trainer.global_step)
'''


def test_a_built_in_callback_is_two_files(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("qat", "conf", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "checkout/qat/training/callbacks/rates.py").write_text(CALLBACK)
    yaml = "rates:\n  _target_: qat.training.callbacks.rates.PrintsRate\n"
    (tmp_path / "checkout/conf/callbacks/rates.yaml").write_text(yaml)
    settings = {"model.path": tiny_model, "data.train": text_file, "run.dir": tmp_path / "run", "export.formats": "[]"}
    settings |= {"trainer.max_steps": 2, "data.sequence_length": 32, "data.batch_size": 2, "quant.kernels": "reference"}
    words = ["recipe=plain", "callbacks=rates", *(f"{key}={value}" for key, value in settings.items())]
    command = [sys.executable, "-m", "qat.train", *words]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "checkout")}
    resume = [*command[:3], f"resume={tmp_path / 'run'}", "trainer.max_steps=4"]
    for words, step in ((command, 2), (resume, 4)):
        done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and f"rate after step {step}" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["checkpoint.Path", "nowhere.Checkpoint", "checkpoint.pl.Callback", "..checkpoint.Checkpoint"])
def test_a_saved_callback_of_ours_is_one_that_its_file_defines(target: str) -> None:
    check_targets({"callbacks": {"mine": {"_target_": "qat.training.callbacks.checkpoint.Checkpoint"}}}, {"optim"})
    with pytest.raises(ValueError, match=r"callbacks.mine of the saved configuration has _target_="):
        check_targets({"callbacks": {"mine": {"_target_": f"qat.training.callbacks.{target}"}}}, {"optim"})
