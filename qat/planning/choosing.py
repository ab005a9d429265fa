"""What of a configuration memory and time depend on; an optimizer's state as measured on a small matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qat.config import TrainConfig
from qat.losses import needs
from qat.planning.memory import CODES, DDP, FSDP2, ONE, Choice


def choice_of(config: TrainConfig, state: float, resting: float = 0.0) -> Choice:
    """What of a configuration memory and time depend on; the optimizer's bytes of a parameter, on the device and beside it."""
    trainer = config.trainer
    world = trainer.devices * trainer.num_nodes
    sharded = FSDP2 if trainer.gather == "float32" else CODES
    scheme = ONE if world == 1 else sharded if trainer.strategy == "fsdp2" else DDP
    return Choice(
        scheme,
        trainer.devices,
        trainer.num_nodes,
        config.data.batch_size,
        trainer.accumulate_grad_batches,
        trainer.activation_checkpointing,
        state,
        getattr(torch, config.model.teacher_dtype).itemsize if needs(config.distill, "teacher") else 0,
        trainer.precision != "32-true",
        _floats(config),
        trainer.gradient_sums == "float64",
        resting,
    )


def _floats(config: TrainConfig) -> float:
    """The share of steps whose codes are soft, or blended in."""
    soft = config.optim.anneal_share if config.optim.annealed else 0.0
    return max(soft, min(1.0, config.optim.lambda_steps / config.trainer.max_steps))


Factory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def state_bytes(factory: Factory) -> float:
    """Bytes on the device that an optimizer keeps for each element of a matrix, as it does after a step."""
    return _kept(factory, rests=False)


def resting_bytes(factory: Factory) -> float:
    """The same of what it keeps in the CPU's memory, beside the device (`rests`)."""
    return _kept(factory, rests=True)


def _kept(factory: Factory, rests: bool) -> float:
    weight = nn.Parameter(torch.ones(256, 256))
    weight.grad = torch.ones_like(weight)
    optimizer = factory([{"name": "latent", "params": [weight], "lr": 1e-3, "weight_decay": 0.0}])
    if getattr(optimizer, "rests", False) is not rests:
        return 0.0
    optimizer.step()
    return sum(map(_bytes, tree_leaves(optimizer.state_dict()))) / weight.numel()


def _bytes(value: Any) -> int:
    """Of a tensor, whose own parts (codes and scales of one in 8 bits) count in its place; 0 of a number or a step."""
    if not isinstance(value, torch.Tensor) or value.numel() == 1:
        return 0
    parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
    return sum(_bytes(getattr(value, part)) for part in parts) if parts else value.numel() * value.element_size()
