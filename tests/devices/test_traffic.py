"""Bytes that a rank sends in a step of a run, counted at the collectives, are those of the plan's cost model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from devices.pair import Pair
from devices.test_gather import Sent
from several import tiny

from qat.bench.clusters import student_of
from qat.config import OptimConfig, QuantConfig, TrainConfig
from qat.planning.choosing import choice_of
from qat.planning.speed import bytes_sent
from qat.training.run import run

COUNTED: list[int] = []


class Values(Sent):
    """Without what ranks say in words: flags, a whole number each, by which they agree to go on, and a logged step's means."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "allgather_" or (name == "allreduce_" and args[0][0].dtype == torch.int64):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class Count(pl.Callback):
    """From a step's first forward to its last backward: a step in which nothing is validated or looked at."""

    sent: Sent | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.sent is None:
            self.sent = Values()
            self.sent.__enter__()

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        assert self.sent is not None
        self.sent.__exit__(None, None, None)
        COUNTED.append(sum(self.sent.bytes.values()))
        self.sent = None


def counted(config: TrainConfig) -> list[int]:
    """Bytes of each step but the first, at which a run begins."""
    COUNTED.clear()
    run(replace(config, callbacks={"count": {"_target_": f"{__name__}.Count"}}))
    return COUNTED[1:]


CHANNEL = {"granularity": "channel"}
GROUPS = {"granularity": "group", "group_size": 8, "overrides": {"*.down_proj": {"granularity": "channel", "group_size": None}}}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "floats, accumulated": ({"gather": "float32", "accumulate_grad_batches": 2}, {}, {}),
    "tensor, soft": ({}, {}, {"anneal": "soft", "anneal_share": 0.5}),
    "channel, checkpointed, accumulated": ({"activation_checkpointing": True, "accumulate_grad_batches": 2}, CHANNEL, {}),
    "groups, blended": ({}, GROUPS, {"lambda_steps": 2}),
    "components": ({}, {"granularity": "channel", "components": 2}, {}),
    "channel, sums in float64": ({"accumulate_grad_batches": 2, "gradient_sums": "float64"}, CHANNEL, {}),
    "some of them": ({}, {"overrides": {"*.down_proj": {"scale": "absmax"}}}, {}),
}
"""Of `trainer`, `quant` and `optim`."""


@pytest.fixture
def config(still: Path, text_file: Path, tmp_path: Path) -> TrainConfig:
    quiet = {"val_every": None, "monitor_every": None, "log_every_n_steps": 4, "samples": 0, "devices": 2, "max_steps": 4}
    return tiny(still, text_file, tmp_path / "run", **{"strategy": "fsdp2", **quiet})


@pytest.mark.parametrize("way", WAYS)
def test_bytes_of_a_step_are_those_of_the_plan(pair: Pair, config: TrainConfig, way: str) -> None:
    """The first of the two that are looked at needs floats where codes are soft or blended in."""
    trainer, quant, optim = WAYS[way]
    config = replace(config, trainer=replace(config.trainer, **trainer), quant=QuantConfig(**quant), optim=OptimConfig(**optim))
    student, choice = student_of(config), choice_of(config, 8.0)
    assert choice.floats == (0.5 if optim else 0.0)
    expected = [bytes_sent(student, replace(choice, floats=share)) for share in (float(bool(optim)), 0.0)]
    assert [found[:2] for found in pair(counted, config, seconds=300)] == [expected] * 2


@pytest.mark.parametrize("sums", ["float32", "float64"])
def test_ddp_sends_gradients_once(pair: Pair, config: TrainConfig, sums: str) -> None:
    """For each of two accumulated batches nothing more."""
    config = replace(config, trainer=replace(config.trainer, strategy="ddp", accumulate_grad_batches=2, gradient_sums=sums))
    expected = bytes_sent(student_of(config), choice_of(config, 8.0))
    assert pair(counted, config, seconds=300) == [[expected] * 3] * 2
