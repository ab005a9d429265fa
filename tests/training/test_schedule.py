"""Schedules by value."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest

from qat.config import OptimConfig, TrainConfig
from qat.conversion.layers import bitlinears
from qat.train import run
from qat.training.callbacks.warmup import blocks_of
from qat.training.schedule import lambda_at, lr_factor, weight_decay_factor


def test_warmup_rises_to_the_peak() -> None:
    assert [lr_factor(s, 100, "cosine", warmup=4) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "middle", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)])
def test_factor_half_way_and_at_the_end(kind: str, middle: float, end: float) -> None:
    assert lr_factor(50, 100, kind) == pytest.approx(middle)
    assert lr_factor(100, 100, kind) == pytest.approx(end)


def test_final_fraction_is_reached() -> None:
    assert lr_factor(100, 100, "cosine", final=0.1) == pytest.approx(0.1)


def test_two_stage_drops_abruptly_half_way() -> None:
    assert lr_factor(49, 100, "two_stage") == pytest.approx(0.51)
    assert lr_factor(50, 100, "two_stage") == pytest.approx(0.5 * 2 / 3)
    assert [weight_decay_factor(s, 100, "two_stage") for s in (49, 50)] == [1.0, 0.0]
    assert weight_decay_factor(50, 100, "cosine") == 1.0


def test_lambda_rises_to_one() -> None:
    assert [lambda_at(s, 4) for s in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert lambda_at(0, 0) == 1.0


def test_a_sigmoid_lambda_is_slow_at_both_ends() -> None:
    assert [lambda_at(s, 4, "sigmoid") for s in (1, 2, 3)] == pytest.approx(
        [1 / (1 + math.exp(2.5)), 0.5, 1 / (1 + math.exp(-2.5))]
    )
    assert 0 < lambda_at(0, 4, "sigmoid") < 0.01 and lambda_at(4, 4, "sigmoid") == 1.0


def test_a_layerwise_lambda_takes_block_after_block() -> None:
    values = [[lambda_at(s, 8, "layerwise", block, 2) for block in range(2)] for s in (0, 2, 4, 6, 8)]
    assert values == [[0.0, 0.0], [0.5, 0.0], [1.0, 0.0], [1.0, 0.5], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (["m.layers.0.q", "m.layers.0.mlp.down", "m.layers.1.q", "m.layers.10.q"], [0, 0, 1, 2]),
        (["m.layers.0.experts.3.up", "m.layers.0.experts.4.up", "m.layers.1.experts.3.up"], [0, 0, 1]),
        (["encoder.block.0.q", "encoder.block.1.q", "decoder.block.0.q"], [0, 1, 2]),
        (["0.h.0.q", "0.h.0.k", "0.h.1.q"], [0, 0, 1]),
        (["m.layers.0.q", "m.layers.0.k"], [0, 1]),
        (["up", "blocks.0.q", "blocks.1.q", "down"], [0, 1, 2, 3]),
        (["only"], [0]),
    ],
)
def test_blocks_are_told_by_names(names: list[str], places: list[int]) -> None:
    assert list(blocks_of(names).values()) == places


class Watch(pl.Callback):
    """Lambda of a layer of each block, before each optimizer step, and the weight decay of the first group."""

    lambdas: dict[int, list[float]] = {}  # noqa: RUF012
    decays: list[float] = []  # noqa: RUF012

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        layers = [layer for name, layer in bitlinears(module.student) if name.endswith("down_proj")]  # type: ignore[arg-type]
        self.lambdas[trainer.global_step] = [1.0 if one.lam is None else one.lam.item() for one in layers]
        self.decays.append(optimizer.param_groups[0]["weight_decay"])


@pytest.fixture
def watched(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setattr(Watch, "lambdas", {})
    monkeypatch.setattr(Watch, "decays", [])
    config.callbacks = {"watch": {"_target_": "test_schedule.Watch"}}
    return config


def test_a_layerwise_run_ends_quantized_and_decay_ends_where_it_is_told(watched: TrainConfig) -> None:
    changes: dict[str, Any] = {"weight_decay": 0.1, "weight_decay_until": 0.25}
    watched.optim = replace(watched.optim, lambda_steps=8, lambda_schedule="layerwise", **changes)
    result = run(watched)
    assert Watch.lambdas == {step: [min(step / 4, 1), min(max(step / 4 - 1, 0), 1)] for step in range(12)}
    assert Watch.decays == [0.1] * 3 + [0.0] * 9
    assert result.verification["packed_max_logit_difference"] == 0


def test_weight_decay_ends_at_its_share() -> None:
    assert [weight_decay_factor(s, 100, "cosine", 0.3) for s in (29, 30, 99)] == [1.0, 0.0, 0.0]
    assert [weight_decay_factor(s, 100, "two_stage", 0.8) for s in (79, 80)] == [1.0, 0.0]
    assert weight_decay_factor(99, 100, "cosine", 1.0) == 1.0 and weight_decay_factor(0, 100, "cosine", 0.0) == 0.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lambda_schedule": "cubic"}, "choose one of linear, sigmoid, layerwise"),
        ({"lambda_schedule": "sigmoid"}, "optim.lambda_schedule=sigmoid needs optim.lambda_steps above 0"),
        ({"weight_decay_until": 1.5}, "optim.weight_decay_until=1.5 is not allowed"),
        ({"weight_decay_until": -0.5}, "optim.weight_decay_until=-0.5 is not allowed"),
    ],
)
def test_values_that_cannot_be(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OptimConfig(**values)


def test_layerwise_does_not_compile(config: TrainConfig) -> None:
    config.optim = replace(config.optim, lambda_steps=8, lambda_schedule="layerwise")
    config.trainer = replace(config.trainer, compile=True)
    with pytest.raises(ValueError, match="lambda_schedule=layerwise does not fit trainer.compile=true"):
        config.check()
