"""Moments that rest beside the device: AdamW's step to the bit, a parameter at a time, its checkpoints, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qat.config import TrainConfig
from qat.config.compose.composing import compose_run
from qat.planning.choosing import resting_bytes, state_bytes
from qat.train import run
from qat.training.gradients.offloaded import OffloadedAdamW
from qat.training.graph.checks import check_optimizer
from qat.training.plugins import optimizer_factory
from qat.training.strategies.divisible import check_resting

NODE = {"_target_": "qat.training.gradients.offloaded.OffloadedAdamW", "betas": [0.9, 0.95]}
SHAPES = ((32, 48), (48,), (16, 16))


def weights() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def made(kind: Any, mine: list[nn.Parameter]) -> Any:
    groups = [{"name": "a", "params": mine[:2], "lr": 1e-2, "weight_decay": 0.1}, {"name": "b", "params": mine[2:], "lr": 3e-3}]
    return kind(groups, betas=(0.9, 0.95), fused=True)


def stepped(optimizer: Any, mine: list[nn.Parameter], seeds: range, unused: int | None = None) -> None:
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + seed)  # as a schedule does
        for number, one in enumerate(mine):
            one.grad = None if number == unused else torch.randn(one.shape, generator=draw)
        optimizer.step()


def test_it_steps_as_adamw_and_reads_and_writes_its_checkpoints() -> None:
    """Those of either go on with the other; a parameter that was never stepped has no state."""
    (mine, ours), (other, theirs) = (
        (one, made(kind, one)) for kind, one in ((OffloadedAdamW, weights()), (torch.optim.AdamW, weights()))
    )
    for optimizer, of in ((ours, mine), (theirs, other)):
        stepped(optimizer, of, range(3), unused=1)
    states = [copy.deepcopy(one.state_dict()) for one in (ours, theirs)]
    assert (
        states[0]["state"].keys() == states[1]["state"].keys() == {0, 2}
        and states[0]["param_groups"] == states[1]["param_groups"]
    )
    for key, found in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][key][name]) for name, value in found.items())
    (again, crossed), (more, back) = (
        (one, made(kind, one)) for kind, one in ((OffloadedAdamW, weights()), (torch.optim.AdamW, weights()))
    )
    crossed.load_state_dict(states[1])
    back.load_state_dict(states[0])
    for of, source in ((again, mine), (more, mine)):
        for one, value in zip(of, source, strict=True):
            one.data.copy_(value.data)
    for optimizer, of in ((ours, mine), (theirs, other), (crossed, again), (back, more)):
        stepped(optimizer, of, range(3, 6))
    for one in zip(mine, other, again, more, strict=True):
        assert all(torch.equal(value, one[0]) for value in one)


def test_one_parameters_moments_are_on_the_device_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, seen = weights(), list[tuple[str, int]]()
    optimizer = made(OffloadedAdamW, mine)
    for name in ("_bring", "_rest"):
        original = getattr(OffloadedAdamW, name)

        def noted(self: Any, parameter: Any, name: str = name, original: Any = original) -> None:
            seen.append((name, next(i for i, one in enumerate(mine) if one is parameter)))
            original(self, parameter)

        monkeypatch.setattr(OffloadedAdamW, name, noted)
    stepped(optimizer, mine, range(2))
    assert seen == [(name, number) for _ in range(2) for number in range(3) for name in ("_bring", "_rest")]
    where = {name: value.data_ptr() for name, value in optimizer.state[mine[0]].items() if name != "step"}
    stepped(optimizer, mine, range(2, 3))
    assert {name: optimizer.state[mine[0]][name].data_ptr() for name in where} == where  # the same pages, which are pinned


def test_a_plan_counts_them_beside_the_device(config: TrainConfig) -> None:
    factory = optimizer_factory(replace(config, optim=replace(config.optim, optimizer=dict(NODE))))
    assert state_bytes(factory) == 0 and resting_bytes(factory) == 8
    plain = optimizer_factory(config)
    assert state_bytes(plain) == 8 and resting_bytes(plain) == 0
    assert compose_run(["recipe=plain", "model.path=m", "data.train=t", "optim=adamw_offloaded"]).optim.optimizer == NODE


def test_it_is_refused_where_there_is_nothing_beside_the_device(config: TrainConfig) -> None:
    config = replace(config, optim=replace(config.optim, optimizer=dict(NODE)))
    with pytest.raises(ValueError, match="this run computes on the CPU, where they are in any case: use optim=adamw"):
        run(config)
    assert not Path(str(config.run.dir)).exists()
    check_resting(optimizer_factory(config), torch.device("cuda"))
    sharded = replace(config, trainer=replace(config.trainer, strategy="fsdp2"))
    with pytest.raises(ValueError, match=r"OffloadedAdamW does not fit trainer.strategy=fsdp2"):
        optimizer_factory(sharded)
    with pytest.raises(
        ValueError, match=r"trainer.graph=true needs an optimizer that is fused and capturable.*not OffloadedAdamW"
    ):
        check_optimizer(made(OffloadedAdamW, weights()))
