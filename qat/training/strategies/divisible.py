"""What a training cannot do with sharded weights, or without a GPU beside the CPU's memory, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat.config import TrainConfig, TrainerConfig
from qat.training.gradients.split import LATENT, parts_of

_KINDS = (LATENT, "matrices")
_ROWS, _WIDTH = 64, 256
"""Of the weight that is tried: enough for optimizers that keep small weights' state in another way."""


def divides(config: TrainerConfig) -> bool:
    """Whether each device holds a part of the model only."""
    return config.strategy == "fsdp2"


def check_divisible(config: TrainConfig, optimizer: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Refuse what needs a whole weight in one place, where weights are divided.

    Raises:
        ValueError: a setting, or an optimizer, that cannot be used with trainer.strategy=fsdp2.
    """
    trainer = config.trainer
    if not divides(trainer):
        return
    if trainer.compile:
        raise ValueError("trainer.compile=true cannot be used with trainer.strategy=fsdp2, which gathers block by block; use ddp")
    if trainer.precision == "16-mixed":
        raise ValueError("trainer.precision=16-mixed scales gradients, which lightning does not do with fsdp2; use bf16-mixed")
    for kind in _KINDS:
        if why := _indivisible(optimizer, kind):
            raise ValueError(f"this optimizer of {kind} weights and trainer.strategy=fsdp2: {why}; use AdamW, or ddp")


def check_resting(optimizer: Callable[[list[dict[str, Any]]], Any], device: torch.device) -> None:
    """Raise ValueError where moments would rest beside a device that computes in the same memory."""
    groups = [{"name": name, "params": [nn.Parameter(torch.zeros(2, 2))], "lr": 1e-3, "weight_decay": 0.0} for name in _KINDS]
    if device.type == "cpu" and any(getattr(part, "rests", False) for part in parts_of(optimizer(groups))):
        raise ValueError(
            "optim=adamw_offloaded keeps moments in the memory of the CPU, beside a GPU; this run computes on the CPU, where they"
            " are in any case: use optim=adamw"
        )


def _indivisible(optimizer: Callable[[list[dict[str, Any]]], Any], kind: str) -> str | None:
    """Why the steps of a weight's rows are not its own; None where they are, to the bit."""
    whole, state = _stepped(optimizer, kind, slice(None))
    halves = [_stepped(optimizer, kind, rows)[0] for rows in (slice(None, _ROWS // 2), slice(_ROWS // 2, None))]
    if odd := next((type(one).__name__ for one in state if isinstance(one, Tensor) and type(one) is not Tensor), None):
        return f"it keeps its state as {odd}"
    return None if torch.equal(whole, torch.cat(halves)) else "its step of a part of a weight is another than of the whole"


def _stepped(optimizer: Callable[[list[dict[str, Any]]], Any], kind: str, rows: slice) -> tuple[Tensor, list[Any]]:
    """Some rows of a weight after three steps, and what the optimizer keeps of them."""
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(_ROWS, _WIDTH, generator=draw)[rows].clone())
    tried = optimizer([{"name": kind, "params": [weight], "lr": 1e-2, "weight_decay": 0.1}])
    for _ in range(3):
        weight.grad = torch.randn(_ROWS, _WIDTH, generator=draw)[rows].clone()
        tried.step()
    return weight.detach(), [leaf for part in parts_of(tried) for leaf in tree_leaves(dict(part.state))]
