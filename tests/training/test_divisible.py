"""What sharded weights cannot do is refused with its reason, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.config import TrainConfig, TrainerConfig
from qat.training.gradients.split import split
from qat.training.plugins import any_rows
from qat.training.strategies.divisible import check_divisible

ADAMW = any_rows(partial(torch.optim.AdamW, fused=True))
MUON = partial(torch.optim.Muon, lr=1e-2)


class Codes(Tensor):
    """A state that is no plain tensor, as that of optimizers in 8 bits."""


class Coded(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["codes"] = parameter.detach().clone().as_subclass(Codes)


def sharded(config: TrainConfig, **trainer: Any) -> TrainConfig:
    return replace(config, trainer=replace(TrainerConfig(), strategy="fsdp2", **trainer))


@pytest.mark.parametrize("optimizer", [ADAMW, torch.optim.SGD, torch.optim.Adagrad, split(torch.optim.SGD, ADAMW)])
def test_steps_of_elements_are_divisible(config: TrainConfig, optimizer: Any) -> None:
    check_divisible(sharded(config), optimizer)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (split(MUON, ADAMW), "latent weights and trainer.strategy=fsdp2: its step of a part of a weight is another"),
        (MUON, "its step of a part of a weight is another than of the whole"),
        (Coded, "it keeps its state as Codes"),
        (torch.optim.Adafactor, "its step of a part of a weight"),
    ],
)
def test_optimizers_of_whole_weights_are_refused(config: TrainConfig, optimizer: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_divisible(sharded(config), optimizer)
    check_divisible(replace(config, trainer=replace(config.trainer, strategy="ddp")), optimizer)


@pytest.mark.parametrize(
    ("trainer", "words"), [({"compile": True}, "trainer.compile=true"), ({"precision": "16-mixed"}, "use bf16-mixed")]
)
def test_settings_are_refused(config: TrainConfig, trainer: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_divisible(sharded(config, **trainer), ADAMW)
