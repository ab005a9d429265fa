"""Runs that compare residual streams: what they minimize, log and leave behind."""

from __future__ import annotations

import contextlib
import copy
import csv
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import lightning.pytorch as pl
import pytest
import torch
from tiny import write_model
from tiny_run import TRAINER, losses
from transformers import AutoModelForCausalLM

from qat import QuantConfig, convert
from qat.config import DistillConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from qat.conversion.layers import bitlinears
from qat.data.order import STEP_TOKENS
from qat.losses.balance import factors
from qat.training import run as job
from qat.training.gradients.terms import TermGradients
from qat.training.module import QATModule
from qat.training.run import run


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def module(folder: Path, distill: DistillConfig, **more: Any) -> QATModule:
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.0) for _ in range(2))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    return QATModule(student.train(), distill, OptimConfig(), torch.optim.SGD, 10, teacher, **more)


def batch() -> dict[str, torch.Tensor]:
    labels = torch.randint(4, 30, (2, 8))
    labels[0, :5] = -100
    return {"input_ids": labels.clamp_min(4), "labels": labels}


def test_hidden_states_are_those_before_the_final_norm(tiny_model: Path) -> None:
    made, given = module(tiny_model, DistillConfig(hidden=1.0)), batch()
    total, count = made.pairs(given)["hidden"]
    expected = torch.zeros(())
    student, teacher = made.student.model, made._teacher.module.model  # type: ignore[union-attr]
    with torch.no_grad():
        asked = {"input_ids": given["input_ids"], "output_hidden_states": True}
        mine, theirs = student(**asked).hidden_states, teacher(**asked).hidden_states
        assert len(mine) == 3  # the embedding, one layer, and the last one's after the norm
        last = [
            model.layers[1](states[1], position_embeddings=_positions(model))
            for model, states in ((student, mine), (teacher, theirs))
        ]
        for s, t in ((mine[1], theirs[1]), last):
            ratio = (s - t).square().sum(-1) / t.square().sum(-1)
            expected += ratio[:, :-1][given["labels"][:, 1:] != -100].sum() / 2
    assert count == 10
    torch.testing.assert_close(total.detach(), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(student.norm(last[0]), last[0])


def _positions(model: Any) -> Any:
    return model.rotary_emb(torch.zeros(1, 8, 32), torch.arange(8)[None])


def gradients(made: QATModule, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    made.student.zero_grad()
    pairs = made.pairs(given)
    (pairs["ce"][0] + pairs["hidden"][0]).backward()
    return {name: p.grad for name, p in made.student.named_parameters()}


@pytest.mark.parametrize("how", ["checkpointing", "compile"])
def test_gradients_under_checkpointing_and_compile(how: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch()
    plain = gradients(module(tiny_model, DistillConfig(hidden=1.0)), given)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # traced, and not built
    other = module(tiny_model, DistillConfig(hidden=1.0), compile=how == "compile")
    if how == "checkpointing":
        other.student.activation_checkpointing_enable()
    for _ in range(2):
        found = gradients(other, given)
        for name, gradient in plain.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_run_logs_each_term_and_leaves_no_hooks(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config.distill = DistillConfig(ce=0.5, kl=0.5, hidden=2.0, hidden_until=0.5, cosine=0.5)
    config.trainer = replace(TRAINER, max_steps=8, val_every=4)
    config.control.enabled = False
    jobs = []
    prepare = job.prepare
    monkeypatch.setattr(job, "prepare", lambda given: jobs.append(prepare(given)) or jobs[0])
    result = run(config)
    found = rows(Path(result.folder))
    train = {int(row["step"]): row for row in found if "train/loss" in row}
    for step, row in train.items():
        weight = max(0.0, 2 * (1 - (step - 1) / 4))
        terms = 0.5 * row["train/ce"] + 0.5 * row["train/kl"] + weight * row.get("train/hidden", 0.0) + 0.5 * row["train/cosine"]
        assert row["train/loss"] == pytest.approx(terms, rel=1e-6)
        assert ("train/hidden" in row) == (step <= 4)
    held_out = [row for row in found if "val/loss" in row]
    assert len(held_out) == 2 and all(row["val/hidden"] > 0 and row["val/cosine"] > 0 for row in held_out)
    for model in (jobs[0].student, jobs[0].base):
        assert not any(part._forward_hooks for part in model.modules())
    assert result.perplexity["packed"] == result.perplexity["trained"]


def test_steps_before_kl_begins_run_no_teacher(tiny_model: Path) -> None:
    made = module(tiny_model, DistillConfig(ce=1.0, kl=1.0, kl_from=0.5))
    calls = []
    made._teacher.module.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    assert made.pairs(batch()).keys() == {"ce"} and not calls
    with torch.no_grad():  # a validation measures all
        assert made.pairs(batch()).keys() == {"ce", "kl"} and len(calls) == 1


class Precision:
    """lightning's, of 32-true."""

    def train_step_context(self) -> Any:
        return contextlib.nullcontext()


class Terminates(pl.Callback):
    """Sends SIGTERM within step 3."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_with_falling_weights_resumes_exactly(config: TrainConfig, tmp_path: Path) -> None:
    config.distill = DistillConfig(hidden=2.0, hidden_until=0.9, kl=0.5, kl_from=0.4)
    config.trainer = replace(TRAINER, max_steps=6)
    whole = Path(run(copy.deepcopy(config)).folder)
    config.run = RunConfig(dir=str(tmp_path / "parts"))
    config.callbacks = {"kill": {"_target_": "test_distilling.Terminates"}}
    parts = Path(run(copy.deepcopy(config)).folder)
    assert len(losses(parts)) == 3
    config.callbacks, config.resume = {}, str(parts)
    run(config)
    assert losses(parts) == losses(whole)
    assert rows(parts) == [{**row, **{key: ANY for key in row if key.startswith("speed/")}} for row in rows(whole)]


def gradient_norms(made: QATModule, given: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each term alone, by a forward and a backward pass of its own."""
    norms = {}
    for name in ("ce", "kl", "hidden"):
        made.student.zero_grad()
        total, count = made.pairs(given)[name]
        (total / count).backward()
        norms[name] = sum(float(p.grad.square().sum()) for p in latents(made)) ** 0.5  # type: ignore[union-attr]
    return norms


def latents(made: QATModule) -> list[torch.nn.Parameter]:
    return [layer.weight for _, layer in bitlinears(made.student)]


@pytest.mark.parametrize("parts", [1, 2])
def test_terms_are_measured_and_weighed_by_their_gradients(parts: int, tiny_model: Path) -> None:
    made, given = module(tiny_model, DistillConfig(kl=1.0, hidden=3.0, balance=5)), batch()
    convert(made.student, QuantConfig())
    expected = gradient_norms(made, given)
    made.student.zero_grad()
    trainer: Any = SimpleNamespace(global_step=0, max_steps=9, accumulate_grad_batches=parts, precision_plugin=Precision())
    terms, random = TermGradients(5, None), torch.get_rng_state()
    terms.on_train_start(trainer, made)
    for i in range(parts):
        some = {key: value.chunk(parts)[i] for key, value in given.items()}
        terms.on_train_batch_start(trainer, made, {**some, STEP_TOKENS: 10}, i)
        assert all(p.grad is None for p in made.student.parameters())
        assert made.weights() == {"ce": 1.0, "kl": 1.0, "hidden": 3.0}
        trainer.global_step += i + 1 == parts
        terms.on_train_batch_end(trainer, made, None, some, i)
    assert terms.norms == pytest.approx(expected, rel=1e-4) and torch.equal(torch.get_rng_state(), random)
    weighed = {name: weight * terms.norms[name] for name, weight in made.weights().items()}
    assert weighed == pytest.approx({"ce": expected["ce"], "kl": expected["ce"], "hidden": 3 * expected["ce"]}, rel=1e-4)
    again = TermGradients(5, None)
    again.load_state_dict(terms.state_dict())
    assert again.factors == terms.factors and terms.factors
    trainer.global_step = 4
    terms.on_train_batch_start(trainer, made, given, 0)
    assert not terms._sums  # until step 5


def test_factors_have_bounds() -> None:
    assert factors({"ce": 2.0, "kl": 0.5, "hidden": 0.0}) == {"ce": 1.0, "kl": 4.0, "hidden": 1e6}
    assert factors({"ce": 0.0, "kl": 0.5}) == factors({"ce": 1.0, "kl": float("nan")}) == factors({"kl": 1.0}) == {}


def test_a_balanced_run_resumes_exactly_and_logs_norms(config: TrainConfig, tmp_path: Path) -> None:
    config.distill = DistillConfig(kl=0.5, hidden=0.5, balance=2)
    config.trainer = replace(TRAINER, max_steps=6, val_every=5, accumulate_grad_batches=2, samples=0)
    whole = Path(run(copy.deepcopy(config)).folder)
    config.run = RunConfig(dir=str(tmp_path / "parts"))
    config.callbacks = {"kill": {"_target_": "test_distilling.Terminates"}}
    parts = Path(run(copy.deepcopy(config)).folder)
    config.callbacks, config.resume = {}, str(parts)
    run(config)
    assert losses(parts) == losses(whole)
    held_out = [row for row in rows(whole) if "val/loss" in row]
    assert [row["step"] for row in held_out] == [5, 6]  # val_every, and the end
    assert all(row[f"optim/grad_norm/{name}"] > 0 for row in held_out for name in ("ce", "kl", "hidden"))
    weights = [row["train/weight/hidden"] for row in rows(parts) if "train/loss" in row]
    assert weights[0] == 0.5 and weights[1] == weights[2] != weights[3] == weights[4] != 0.5
    assert weights == [row["train/weight/hidden"] for row in rows(whole) if "train/loss" in row]


def test_a_teacher_of_other_layers_is_refused_before_anything_runs(config: TrainConfig, tmp_path: Path) -> None:
    other = write_model(tmp_path / "deep", hidden_size=32, intermediate_size=43, num_hidden_layers=3)
    config.model = ModelConfig(path=config.model.path, teacher=str(other))
    config.distill = DistillConfig(hidden=1.0)
    words = "distill.hidden=1.0 compares layer by layer, but the student has 2 layers of width 32 and the teacher 3 of width 32"
    with pytest.raises(ValueError, match=words):
        run(config)
    assert not (tmp_path / "run").exists()
