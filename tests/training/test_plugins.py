"""Optimizers, callbacks and loggers of a configuration are tried before a model is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from qat.config import ModelConfig, OptimConfig, TrainConfig
from qat.config.data import DataConfig
from qat.training.plugins import check_plugins, optimizer_factory
from qat.training.run import run


def of(**arguments: Any) -> TrainConfig:
    return TrainConfig(optim=OptimConfig(optimizer={"_target_": "torch.optim.AdamW", **arguments}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"betas": 3}, "optim.optimizer.betas=3"),
        ({"betas": [0.9]}, "optim.optimizer.betas"),
        ({"betas": [0.9, 1.5]}, "1.5"),
        ({"betas": ["a", "b"]}, "optim.optimizer.betas"),
        ({"eps": -1.0}, "-1.0"),
        ({"nothing": 1}, "nothing"),
        ({"_target_": "torch.optim.LBFGS"}, "closure|weight_decay|per-parameter"),
        ({"_target_": "torch.optim.Nothing"}, "torch.optim.Nothing"),
    ],
)
def test_a_wrong_optimizer_is_one_error(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        optimizer_factory(of(**arguments))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "RAdam"])
def test_a_right_one_is_returned(name: str) -> None:
    assert optimizer_factory(TrainConfig(optim=OptimConfig(optimizer={"_target_": f"torch.optim.{name}"})))


@pytest.mark.parametrize("section", ["callbacks", "logger"])
def test_a_target_that_cannot_be_imported_is_named(section: str) -> None:
    config = TrainConfig(**{section: {"mine": {"_target_": "no.such.Thing"}}})
    with pytest.raises(ValueError, match=rf"{section}.mine._target_=no.such.Thing cannot be imported"):
        check_plugins(config)


def test_it_is_said_before_the_model_is_looked_for() -> None:
    config = of(betas=3)
    config.model, config.data = ModelConfig(path="/nowhere/at/all"), DataConfig(train="package")
    with pytest.raises(ValueError, match="optim.optimizer.betas=3"):
        run(config)
