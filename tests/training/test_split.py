"""An optimizer of their own for latent weights: its steps, its state in checkpoints, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import killed_and_resumed, losses
from torch import nn

from qat.config import ControlConfig, OptimConfig, TrainConfig
from qat.config.compose.targets import check_targets
from qat.train import run
from qat.training.gradients.split import Split, split
from qat.training.plugins import optimizer_factory

MUON = {"_target_": "torch.optim.Muon"}


def weights() -> tuple[nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))


def groups(latent: nn.Parameter, vector: nn.Parameter) -> list[dict[str, Any]]:
    return [
        {"name": "latent", "params": [latent], "lr": 0.02, "weight_decay": 0.1},
        {"name": "vectors", "params": [vector], "lr": 0.01, "weight_decay": 0.0},
    ]


def factory(**latent: Any) -> Any:
    return optimizer_factory(TrainConfig(optim=OptimConfig(latent_optimizer={**MUON, **latent})))


def stepped(optimizer: torch.optim.Optimizer, parameters: tuple[nn.Parameter, ...], steps: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    for _ in range(steps):
        for one in parameters:
            one.grad = torch.randn_like(one)
        optimizer.step()
    return [one.detach().clone() for one in parameters]


def test_each_part_steps_as_it_would_alone() -> None:
    both = weights()
    latent, vector = stepped(factory()(groups(*both)), both, 3)
    alone = weights()
    muon = torch.optim.Muon([alone[0]], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([alone[1]], lr=0.01, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    torch.manual_seed(1)
    for _ in range(3):
        for one in alone:
            one.grad = torch.randn_like(one)
        muon.step()
        adamw.step()
    assert torch.equal(latent, alone[0]) and torch.equal(vector, alone[1])


def test_the_length_of_muons_steps_may_be_told() -> None:
    optimizer = factory(adjust_lr_fn="original")(groups(*weights()))
    assert optimizer.parts[0].defaults["adjust_lr_fn"] == "original"


def test_loaded_state_continues_to_the_bit() -> None:
    whole = weights()
    expected = stepped(factory()(groups(*whole)), whole, 2)
    once = weights()
    first = factory()(groups(*once))
    torch.manual_seed(1)
    for one in once:
        one.grad = torch.randn_like(one)
    first.step()
    again = factory()(groups(*once))
    again.load_state_dict(first.state_dict())
    assert [group["name"] for group in again.param_groups] == ["latent", "vectors"]
    assert all(a is b for a, b in zip(again.param_groups, (g for p in again.parts for g in p.param_groups), strict=True))
    for one in once:
        one.grad = torch.randn_like(one)
    again.step()
    assert all(torch.equal(a, b) for a, b in zip(once, expected, strict=True))
    with pytest.raises(ValueError, match="the checkpoint holds 1 optimizers, and this run has 2"):
        again.load_state_dict(torch.optim.SGD([once[0]]).state_dict())


def test_without_latent_weights_there_is_one_optimizer() -> None:
    latent, vector = weights()
    rest = torch.optim.AdamW
    assert isinstance(split(torch.optim.Muon, rest)(groups(latent, vector)), Split)
    assert isinstance(split(torch.optim.Muon, rest)(groups(latent, vector)[1:]), rest)


def test_a_resumed_run_continues_to_the_bit(config: TrainConfig, tmp_path: Path) -> None:
    config.optim = replace(config.optim, latent_optimizer=MUON, schedule="two_stage", weight_decay=0.1)
    config.control = ControlConfig(enabled=True, lr=1e-3)
    result = run(config)
    assert result.verification["packed_max_logit_difference"] == 0
    config.control = ControlConfig()
    parts = killed_and_resumed(config, tmp_path / "parts", step=6, checkpoint_every=4)
    assert losses(parts) == losses(Path(result.folder))


@pytest.mark.parametrize(
    ("latent", "words"),
    [
        ({"_target_": "torch.optim.Muon", "momentum": -1}, "optim.latent_optimizer.momentum=-1: this optimizer cannot be used"),
        ({"_target_": "torch.optim.Nothing"}, "torch.optim.Nothing"),
    ],
)
def test_a_wrong_one_is_one_error(latent: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        optimizer_factory(TrainConfig(optim=OptimConfig(latent_optimizer=latent)))


def test_it_needs_a_target() -> None:
    with pytest.raises(ValueError, match="optim.latent_optimizer needs a _target_"):
        OptimConfig(latent_optimizer={"lr": 1.0})


def test_a_saved_one_may_not_run_any_code() -> None:
    usual = {"optimizer": {"_target_": "torch.optim.AdamW"}}
    check_targets({"optim": {**usual, "latent_optimizer": MUON}}, set())
    with pytest.raises(ValueError, match=r"optim.latent_optimizer of the saved configuration has _target_='os.system'"):
        check_targets({"optim": {**usual, "latent_optimizer": {"_target_": "os.system"}}}, set())
