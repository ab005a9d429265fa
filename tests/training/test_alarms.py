"""Alarms provoked in small runs: each is raised once, in the terminal, in the run's file and in loggers that can show it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from tiny import write_model
from tiny_run import TRAINER, killed_and_resumed
from transformers import AutoModelForCausalLM

from qat.config import DistillConfig, ModelConfig, TrainConfig
from qat.conversion.layers import bitlinears
from qat.monitor.alarms import Alarm, read_alarms
from qat.train import run
from qat.training.loggers import SINKS, Sink

QUIET = replace(TRAINER, max_steps=24, monitor_every=2, gradient_clip_val=None)


def alarms_of(config: TrainConfig) -> list[Alarm]:
    return read_alarms(Path(run(config).folder))


class Harm(pl.Callback):
    """Does something to the student after a step that a training would not."""

    def __init__(self, what: str, at: tuple[int, ...] = (12,), layers: tuple[int, ...] = (0, 1)) -> None:
        self.what, self.at, self.layers = what, at, layers

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step in self.at:
            getattr(self, self.what)([layer.q_proj.weight for layer in self.attentions(module)], module.student)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        for layer in self.attentions(module) if self.what == "cuts" else ():
            layer.q_proj.weight.grad.zero_()

    def attentions(self, module: Any) -> list[Any]:
        return [module.student.model.layers[i].self_attn for i in self.layers]

    def cuts(self, weights: list[torch.Tensor], student: Any) -> None:
        pass

    def turns_a_column(self, weights: list[torch.Tensor], student: Any) -> None:
        for weight in weights:
            weight[:, 0].neg_()

    def blows_up(self, weights: list[torch.Tensor], student: Any) -> None:
        student.model.norm.weight.mul_(-40)

    def turns(self, weights: list[torch.Tensor], student: Any) -> None:
        student.model.norm.weight.mul_(-2)

    def breaks(self, weights: list[torch.Tensor], student: Any) -> None:
        student.model.norm.weight.mul_(float("nan"))

    def swings(self, weights: list[torch.Tensor], student: Any) -> None:
        for _, layer in bitlinears(student):
            layer.weight.neg_()

    def shrinks(self, weights: list[torch.Tensor], student: Any) -> None:
        for weight in weights:
            weight.mul_(0.01)

    def empties(self, weights: list[torch.Tensor], student: Any) -> None:
        for weight in weights:
            weight[0, 0] = 1000


class CutsLate(Harm):
    """Cuts the gradient off once the model is blown up."""

    def __init__(self) -> None:
        super().__init__("cuts")

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        if trainer.global_step >= 10:
            super().on_before_optimizer_step(trainer, module, optimizer)


class Far(pl.Callback):
    """Puts the student far from the model in full precision before it trains."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    @torch.no_grad()
    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        module.student.model.norm.weight.mul_(self.factor)


def far(factor: float) -> dict[str, Any]:
    return {"_target_": "test_alarms.Far", "factor": factor}


def harmed(config: TrainConfig, what: str, **more: Any) -> TrainConfig:
    config.trainer = QUIET
    config.callbacks = {"harm": {"_target_": "test_alarms.Harm", "what": what, **more}}
    return config


@pytest.mark.parametrize(
    ("what", "kind", "where"),
    [
        ("blows_up", "divergence", ""),
        ("cuts", "no_gradient", "q"),
        ("shrinks", "scale_collapse", "q"),
        ("empties", "zero_collapse", "q"),
    ],
)
def test_harm_is_noticed(config: TrainConfig, capsys: pytest.CaptureFixture[str], what: str, kind: str, where: str) -> None:
    found = alarms_of(harmed(config, what))
    [alarm] = [one for one in found if one.kind == kind]
    assert alarm.where == where and alarm.step <= 18 and capsys.readouterr().out.count(f"alarm, {alarm.line}") == 1


def test_spikes_of_the_loss(config: TrainConfig) -> None:
    config = harmed(config, "turns", at=[13, 14, 16, 17, 20, 21])  # twice is as it was, times 4
    assert "loss_spikes" in {one.kind for one in alarms_of(config)}


def test_codes_that_never_change(config: TrainConfig) -> None:
    config.trainer, config.optim = QUIET, replace(config.optim, latent_lr_multiplier=0.0, weight_decay=0.0)
    found = alarms_of(config)
    assert {(one.kind, one.where) for one in found} == {
        ("codes_frozen", name) for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert {one.until for one in found} == {None}


def test_a_layer_without_gradient_is_named(config: TrainConfig) -> None:
    [alarm] = [one for one in alarms_of(harmed(config, "cuts", layers=[0])) if one.kind == "no_gradient"]
    assert alarm.where == "model.layers.0.self_attn.q_proj" and alarm.key == f"model.exclude=[{alarm.where}]"


def test_inputs_with_an_outlier(config: TrainConfig, tmp_path: Path) -> None:
    model = write_model(tmp_path / "wide", hidden_size=16, intermediate_size=5000, num_hidden_layers=1)  # sqrt(5000) = 71
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][7] *= 1e4
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config.model = ModelConfig(path=str(model), exclude=["*gate_proj", "*up_proj"])
    config.trainer, config.optim = replace(QUIET, max_steps=4), replace(config.optim, lr=1e-5)
    [alarm] = [one for one in alarms_of(config) if one.kind == "act_outliers"]
    assert (alarm.step, alarm.where, alarm.key) == (2, "down", "quant.act_hadamard=true")


def test_what_follows_from_a_divergence_is_not_said(config: TrainConfig) -> None:
    """Without gradients too, from its first step on, as a softmax that is saturated has none."""
    config = harmed(config, "blows_up", at=[7])
    config.trainer = replace(QUIET, log_every_n_steps=1, monitor_every=6)
    config.callbacks["cut"] = {"_target_": "test_alarms.CutsLate"}
    assert [one.kind for one in alarms_of(config)] == ["divergence"]


def test_a_flat_loss_while_codes_change(config: TrainConfig, tmp_path: Path) -> None:
    """Every window of the text is the same, updates are nearly none, and a column's codes turn in each step."""
    (tmp_path / "same.txt").write_text("the cat\n" * 1000)
    config = harmed(config, "turns_a_column", at=list(range(1, 81)))
    config.data = replace(config.data, train=str(tmp_path / "same.txt"))
    config.optim = replace(config.optim, lr=1e-7, warmup_steps=0)
    config.trainer, config.callbacks["far"] = replace(QUIET, max_steps=80, val_every=10, monitor_every=1), far(-60)
    alarm = next(one for one in alarms_of(config) if one.kind == "plateau")
    assert alarm.key == "" and "so wait" in alarm.text and 12 <= alarm.step <= 56


def test_a_teacher_that_does_not_know_the_text(config: TrainConfig, tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(config.model.path)
    with torch.no_grad():
        teacher.model.norm.weight.mul_(-30)
    teacher.save_pretrained(tmp_path / "teacher")
    config.model.teacher, config.distill = str(tmp_path / "teacher"), DistillConfig(ce=1.0, kl=0.01)
    config.trainer, config.optim = replace(QUIET, max_steps=4, val_every=2), replace(config.optim, lr=1e-6)
    config.callbacks = {"far": far(-60)}
    [alarm] = [one for one in alarms_of(config) if one.kind == "teacher_mismatch"]
    assert alarm.key == "model.teacher=shared" and "does not know this text" in alarm.text


def test_codes_that_swing_to_the_end(config: TrainConfig) -> None:
    config = harmed(config, "swings", at=list(range(1, 25)))
    config.trainer = replace(QUIET, monitor_every=1)
    [alarm] = [one for one in alarms_of(config) if one.kind == "oscillation"]
    assert alarm.step == 22  # the last tenth


def test_a_term_that_drowns_the_others(config: TrainConfig) -> None:
    config.trainer, config.distill = replace(QUIET, val_every=6, max_steps=12), DistillConfig(ce=1e-3, kl=1e-3, hidden=50.0)
    [alarm] = [one for one in alarms_of(config) if one.kind == "term_drowns"]
    assert alarm.where == "hidden" and alarm.step == 12


def test_a_text_that_is_read_too_often(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the cat sat.\na dog ran,\n" * 25)
    config.data, config.trainer = replace(config.data, train=str(tmp_path / "short.txt")), replace(QUIET, max_steps=80)
    [alarm] = [one for one in alarms_of(config) if one.kind == "data_repeated"]
    assert alarm.step == 1


def test_a_teacher_that_knows_less_than_its_student(config: TrainConfig) -> None:
    config.trainer, config.distill = replace(QUIET, val_every=24), DistillConfig(ce=1.0, kl=0.01)  # the teacher is random
    [alarm] = [one for one in alarms_of(config) if one.kind == "teacher_mismatch"]
    assert alarm.step == 24


def test_a_run_that_ends_in_nan_has_its_alarm(config: TrainConfig) -> None:
    config = harmed(config, "breaks")
    with pytest.raises(ValueError, match="the loss is nan at step 13"):
        run(config)
    [alarm] = read_alarms(Path(config.run.dir or ""))
    assert (alarm.kind, alarm.step) == ("divergence", 13) and "the loss is nan at step 13" in alarm.text


class Alerted(CSVLogger):
    """A logger that can show alarms."""


def test_loggers_show_alarms(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str, int]] = []
    monkeypatch.setitem(SINKS, Alerted, Sink(alert=lambda logger, *alarm: said.append(alarm)))
    config = harmed(config, "shrinks", at=[2])
    config.logger = {"alerted": {"_target_": "test_alarms.Alerted"}}
    [alarm] = alarms_of(config)
    assert said == [("scale collapse", alarm.line, alarm.step)]


@pytest.mark.parametrize(("step", "checkpoint_every"), [(9, 5), (17, 10)])  # before and after the alarms at step 8
def test_a_killed_run_s_alarms_are_those_of_an_undisturbed_one(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int, checkpoint_every: int
) -> None:
    config.trainer, config.optim = QUIET, replace(config.optim, latent_lr_multiplier=0.0, weight_decay=0.0)
    parts = killed_and_resumed(copy.deepcopy(config), tmp_path / "parts", step, checkpoint_every)
    assert capsys.readouterr().out.count("alarm, step 8: no code of q has changed") == (2 if step == 9 else 1)
    assert [(one.step, one.where) for one in read_alarms(parts)] == [
        (8, name) for name in ("q", "k", "v", "o", "gate", "up", "down")
    ]


def test_a_healthy_run_raises_none(config: TrainConfig) -> None:
    config.trainer, config.distill = replace(QUIET, val_every=12, monitor_every=4), DistillConfig(ce=1.0, kl=0.0)
    assert alarms_of(config) == []
