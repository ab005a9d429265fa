"""Annealing in a run: the schedule, a resume half way, and that whatever is measured has hard codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_run import killed_and_resumed, losses

from qat.config import TrainConfig
from qat.conversion.layers import bitlinears
from qat.reporting.estimate import annealing
from qat.train import run
from qat.training.callbacks import Anneal
from qat.training.schedule import beta_at


@pytest.fixture
def annealed(config: TrainConfig) -> TrainConfig:
    config.optim = replace(config.optim, anneal="soft")
    config.trainer = replace(config.trainer, val_every=5, val_batches=2, samples=1)
    return config


class Watch(pl.Callback):
    """Beta of the first layer at each step, and what it was wherever something is measured."""

    steps: dict[int, float | None] = {}  # noqa: RUF012
    measured: list[tuple[str, torch.Tensor | None]] = []  # noqa: RUF012
    raising: int | None = None

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        beta = first(module).beta
        self.steps[trainer.global_step] = None if beta is None else beta.item()
        if trainer.global_step == self.raising:
            raise RuntimeError("as asked")

    def on_validation_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.measured.append(("validation", first(module).beta))

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.measured.append(("samples", first(module).beta))

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.measured.append(("end", first(module).beta))


def first(module: Any) -> Any:
    return next(layer for _, layer in bitlinears(module.student))


class Rates(pl.Callback):
    """The rate of each group at each step, and the first layer's latent weights before it."""

    seen: dict[int, dict[str, float]] = {}  # noqa: RUF012
    weights: list[torch.Tensor] = []  # noqa: RUF012

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        self.seen[trainer.global_step] = {group["name"]: group["lr"] for group in optimizer.param_groups}
        self.weights.append(first(module).weight.detach().clone())


@pytest.fixture
def watch(annealed: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> type[Watch]:
    for name, value in {"steps": {}, "measured": [], "raising": None}.items():
        monkeypatch.setattr(Watch, name, value)
    annealed.callbacks = {"watch": {"_target_": "test_anneal.Watch"}}
    return Watch


def test_beta_rises_by_a_constant_factor_and_ends() -> None:
    values = [beta_at(step, 100, 2.0, 60.0, 0.8) for step in range(100)]
    soft = [value for value in values if value is not None]
    assert len(soft) == 80 and values[80:] == [None] * 20
    assert soft[0] == 2 and soft[40] == pytest.approx(120**0.5) and soft[79] == pytest.approx(2 * 30 ** (79 / 80))
    assert beta_at(99, 100, 2.0, 60.0, 1.0) == pytest.approx(2 * 30**0.99)
    assert beta_at(0, 1, 2.0, 60.0, 0.8) == 2


def test_a_run_is_soft_in_its_steps_and_hard_where_it_is_measured(annealed: TrainConfig, watch: type[Watch]) -> None:
    result = run(annealed)
    expected = {step: beta_at(step, 12, 2.0, 60.0, 0.8) for step in range(12)}
    assert watch.steps == pytest.approx(expected) and expected[9] is not None and expected[10] is None
    assert {what for what, _ in watch.measured} == {"validation", "samples", "end"}
    assert all(beta is None for _, beta in watch.measured)
    assert result.status == "done" and result.verification["packed_max_logit_difference"] == 0
    assert result.perplexity["packed"] == result.perplexity["trained"]


def test_a_run_that_ends_soft_is_packed_as_it_was_measured(annealed: TrainConfig) -> None:
    annealed.optim = replace(annealed.optim, anneal_share=1.0)
    result = run(annealed)
    assert result.verification["packed_max_logit_difference"] == 0 and result.perplexity["packed"] == result.perplexity["trained"]


def test_latent_weights_rest_with_their_codes(annealed: TrainConfig) -> None:
    annealed.callbacks = {"rates": {"_target_": "test_anneal.Rates"}}
    annealed.optim = replace(annealed.optim, anneal_rest_lr=0.0, schedule="constant", warmup_steps=0, weight_decay=0.1)
    Rates.seen, Rates.weights = {}, []
    result = run(annealed)
    assert [Rates.seen[step]["latent"] for step in range(12)] == [annealed.optim.peak] * 10 + [0.0] * 2
    assert all(rates["vectors"] == annealed.optim.peak for rates in Rates.seen.values())
    before, held, end = Rates.weights[8], Rates.weights[10], Rates.weights[11]
    assert not torch.equal(before, held) and torch.equal(held, end)  # as they were after the last soft step
    assert result.perplexity["packed"] == result.perplexity["trained"]


def test_a_resume_while_codes_are_held_is_the_whole_run(annealed: TrainConfig, tmp_path: Path) -> None:
    annealed.optim = replace(annealed.optim, anneal_rest_lr=0.0, anneal_share=0.4)
    whole = Path(run(annealed).folder)
    parts = killed_and_resumed(annealed, tmp_path / "parts", step=6, checkpoint_every=4)
    assert losses(parts) == losses(whole)


def test_an_error_leaves_hard_codes(annealed: TrainConfig, watch: type[Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Any] = []
    original = Anneal.on_exception

    def after(self: Anneal, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        original(self, trainer, module, exception)
        left.append(first(module).beta)

    monkeypatch.setattr(Anneal, "on_exception", after)
    watch.raising = 3
    with pytest.raises(RuntimeError, match="as asked"):
        run(annealed)
    assert left == [None] and watch.steps[3] is not None


def test_a_resume_half_way_gives_the_same_losses_to_the_bit(annealed: TrainConfig, tmp_path: Path) -> None:
    annealed.trainer = replace(annealed.trainer, accumulate_grad_batches=2)
    whole = Path(run(annealed).folder)
    parts = killed_and_resumed(annealed, tmp_path / "parts", step=6, checkpoint_every=4)
    assert losses(parts) == losses(whole)
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (whole, parts))
    assert one["perplexity"] == two["perplexity"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"anneal": "hard"}, "optim.anneal='hard' is not allowed; choose one of none, soft"),
        ({"anneal_from": 0.0}, "optim.anneal_from=0.0 is not allowed"),
        ({"anneal_from": 9.0, "anneal_to": 8.0}, "optim.anneal_to=8.0 is not allowed; it must be at least 9.0"),
        ({"anneal_share": 0.0}, "optim.anneal_share=0.0 is not allowed; it must be above 0"),
        ({"anneal_share": 1.5}, "optim.anneal_share=1.5 is not allowed"),
        ({"anneal_rest_lr": -1.0}, "optim.anneal_rest_lr=-1.0 is not allowed; it must be at least 0"),
        ({"anneal_to": 1e9}, "optim.anneal_to=1000000000.0 is not allowed"),
    ],
)
def test_values_that_cannot_be(config: TrainConfig, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(config.optim, **values)


def test_a_quantizer_without_a_soft_form_is_refused_before_a_run(annealed: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from qat.quantizers import QUANTIZERS

    monkeypatch.setitem(QUANTIZERS, "ternary", replace(QUANTIZERS["ternary"], soft=None))
    with pytest.raises(ValueError, match="optim.anneal=soft does not fit quant.weight=ternary, which has no soft form"):
        annealed.check()


def test_the_dry_run_says_it(annealed: TrainConfig) -> None:
    assert annealing(annealed) == ["weights         soft from 2 to 60 in 10 steps, then 2 with codes"]
    annealed.optim = replace(annealed.optim, anneal="none")
    assert annealing(annealed) == []
