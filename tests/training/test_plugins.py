"""Optimizers, callbacks and loggers of a configuration are tried before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from qat.config import ModelConfig, OptimConfig, TrainConfig, TrainerConfig
from qat.config.data import DataConfig
from qat.training.loggers import Trackers
from qat.training.loggers.record import About
from qat.training.plugins import callbacks, check_plugins, instantiated, optimizer_factory
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


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("EarlyStopping", {}, "EarlyStopping.*'monitor'"),
        ("EarlyStopping", {"monitor": "train/loss"}, "EarlyStopping watches train/loss, but there are no validations"),
        ("ModelCheckpoint", {"monitor": "train/cee"}, "watches train/cee, which is no metric; choose one of train/loss"),
        (
            "ModelCheckpoint",
            {"monitor": "val_loss"},
            "which is no metric; choose one of val/loss.*; near it are val/loss",
        ),
        ("ModelCheckpoint", {"monitor": "quant/flip_rat"}, "quant/flip_rat, which is no metric; choose one of val/loss"),
        ("ModelCheckpoint", {"monitor": "quant/flip_rate"}, "quant/flip_rate, which callbacks do not see; choose one of val/"),
        ("ModelCheckpoint", {"monitor": "lr-AdamW/latent"}, "lr-AdamW/latent, which is no metric"),
        ("GradientAccumulationScheduler", {"scheduling": {0: 2}}, "set trainer.accumulate_grad_batches instead"),
        ("LearningRateFinder", {}, "set optim.lr"),
        ("BatchSizeFinder", {}, "set data.batch_size instead"),
    ],
)
def test_a_callback_that_cannot_work_is_said_before_the_model_is_looked_for(
    name: str, arguments: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("x")
    node = {"_target_": f"lightning.pytorch.callbacks.{name}", **arguments}
    config = TrainConfig(
        model=ModelConfig(path="/nowhere/at/all"), data=DataConfig(train=str(tmp_path / "a.txt")), callbacks={"mine": node}
    )
    with pytest.raises(ValueError, match=words):
        run(config)


def test_callbacks_of_the_configuration_are_made() -> None:
    target = "lightning.pytorch.callbacks"
    nodes = {"a": {"_target_": f"{target}.ModelSummary"}, "b": {"_target_": f"{target}.LearningRateMonitor"}}
    assert [type(one).__name__ for one in callbacks(TrainConfig(callbacks=nodes))] == ["ModelSummary", "LearningRateMonitor"]


class Counts(Callback):
    """Logs a metric of its own."""


@pytest.mark.parametrize(
    ("monitor", "beside"),
    [
        ("val/hidden", None),
        ("optim/grad_norm/kl", None),
        ("step", None),
        (None, None),
        ("mine", "test_plugins.Counts"),
        ("lr-AdamW/latent", "lightning.pytorch.callbacks.LearningRateMonitor"),
    ],
)
def test_what_a_callback_may_watch(monitor: str | None, beside: str | None) -> None:
    nodes = {"best": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "monitor": monitor}}
    nodes |= {"beside": {"_target_": beside}} if beside else {}
    config = TrainConfig(callbacks=nodes, trainer=TrainerConfig(val_every=5))
    assert len(callbacks(config)) == len(nodes)


def test_a_logger_writes_where_it_is_told_and_else_into_the_run(tmp_path: Path) -> None:
    node = {"_target_": "lightning.pytorch.loggers.CSVLogger"}
    config = TrainConfig(logger={"own": {**node, "save_dir": str(tmp_path / "mine")}, "ours": node})
    trackers, folder = Trackers(), tmp_path / "run"
    trackers.open(config, About("id", "name", folder), instantiated)
    assert [one.save_dir for one in trackers.loggers] == [str(tmp_path / "mine"), str(folder)]


def test_an_import_error_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="cannot be imported"):
        check_plugins(TrainConfig(callbacks={"mine": {"_target_": "lightning.pytorch.callbacks.NoSuch"}}))
    assert capfd.readouterr() == ("", "")


def fused(optimizer: dict, **trainer) -> object:
    config = TrainConfig(optim=OptimConfig(optimizer=optimizer), trainer=TrainerConfig(**trainer))
    return optimizer_factory(config)([{"params": [torch.nn.Parameter(torch.ones(2))]}]).defaults.get("fused")


def test_an_optimizer_is_fused_where_it_can_be():
    adamw = {"_target_": "torch.optim.AdamW"}
    assert fused(adamw) is True and fused({"_target_": "torch.optim.SGD", "lr": 0.1}) is True
    assert fused({**adamw, "fused": False}) is False and not fused({**adamw, "foreach": True})
    assert fused(adamw, precision="bf16-mixed") is True
    assert not fused(adamw, precision="16-mixed")  # lightning refuses to clip there
    assert fused({"_target_": "torch.optim.RAdam"}) is None


def betas(half_life: float, target: str = "torch.optim.AdamW", **trainer: Any) -> list[Any]:
    optimizer: dict[str, Any] = {"_target_": target, "betas": [0.8, 0.95]} if "Adam" in target else {"_target_": target}
    config = TrainConfig(optim=OptimConfig(optimizer=optimizer, beta2_half_life=half_life), trainer=TrainerConfig(**trainer))
    config.data.batch_size, config.data.sequence_length = 2, 512
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1} for _ in range(2)]
    return [group["betas"] for group in optimizer_factory(config)(groups).param_groups]


@pytest.mark.parametrize("target", ["torch.optim.AdamW", "torch.optim.Adam", "torch.optim.RAdam", "torch.optim.NAdam"])
def test_the_second_beta_halves_in_so_many_tokens(target: str) -> None:
    assert betas(1024.0, target) == [(0.8, 0.5)] * 2
    assert betas(1024.0, target, accumulate_grad_batches=4) == [(0.8, 0.5**4)] * 2
    assert betas(102400.0, target) == [(0.8, pytest.approx(0.5**0.01))] * 2


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adafactor"])
def test_an_optimizer_without_betas_has_no_half_life(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*optim.beta2_half_life=1e\+06 needs one with two betas"):
        betas(1e6, f"torch.optim.{name}")
