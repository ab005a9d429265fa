"""The plan of a run on devices that are not here: a model without weights, an optimizer's state as measured on a small matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qat.config import TrainConfig
from qat.conversion import walker as conversion
from qat.losses import needs
from qat.models.weightless import faked, weightless
from qat.planning.devices import device
from qat.planning.facts import Facts, Saved, facts_of, units_of, weights_of
from qat.planning.memory import DDP, FSDP2, ONE, Choice, Student
from qat.planning.table import print_table
from qat.training.plugins import optimizer_factory
from qat.training.trainings import check_teacher

_NOTHING = Saved(0, 0)


def show(config: TrainConfig, tokens: int, on: str) -> None:
    """Print what the run takes on that kind of device.

    Raises:
        ValueError: a configuration, model or device that cannot be planned.
    """
    kind = device(on)
    if tokens < config.data.sequence_length:
        length = config.data.sequence_length
        raise ValueError(f"a budget of {tokens:,} tokens is less than one sequence of data.sequence_length={length}")
    check_teacher(config)
    student = student_of(config)
    factory = optimizer_factory(replace(config, optim=replace(config.optim, beta2_half_life=None)))
    print_table(student, choice_of(config, state_bytes(factory)), kind, tokens)


def student_of(config: TrainConfig) -> Student:
    """The converted model of a configuration, and its teacher, by shapes alone."""
    model = weightless(config.model).train()
    units = units_of(model)
    chosen = {"include": config.model.include or None, "exclude": config.model.exclude or None}
    with torch.device("meta"):
        conversion.convert(model, config.quant, **chosen)  # type: ignore[arg-type]
    tokens = torch.zeros(1, config.data.sequence_length, dtype=torch.long)
    sample = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    facts = facts_of(model, units, sample, faked, config.trainer.precision != "32-true")
    if not needs(config.distill, "teacher"):
        return Student(facts)
    return Student(facts, facts if config.model.teacher == "shared" else _teacher(config, facts.length))


def _teacher(config: TrainConfig, length: int) -> Facts:
    model = weightless(config.model, config.model.teacher)
    root, blocks, flops, vocabulary = weights_of(model, units_of(model), length)
    return Facts(root, blocks, length, _NOTHING, _NOTHING, flops, vocabulary)


def choice_of(config: TrainConfig, state: float) -> Choice:
    """What of a configuration memory and time depend on."""
    trainer = config.trainer
    world = trainer.devices * trainer.num_nodes
    scheme = ONE if world == 1 else FSDP2 if trainer.strategy == "fsdp2" else DDP
    return Choice(
        scheme,
        trainer.devices,
        trainer.num_nodes,
        config.data.batch_size,
        trainer.accumulate_grad_batches,
        trainer.activation_checkpointing,
        state,
        4.0 if needs(config.distill, "teacher") else 0.0,
        trainer.precision != "32-true",
    )


def state_bytes(factory: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> float:
    """Bytes that an optimizer keeps for each element of a matrix, as it does after a step."""
    weight = nn.Parameter(torch.ones(256, 256))
    weight.grad = torch.ones_like(weight)
    optimizer = factory([{"name": "latent", "params": [weight], "lr": 1e-3, "weight_decay": 0.0}])
    optimizer.step()
    return sum(map(_bytes, tree_leaves(optimizer.state_dict()))) / weight.numel()


def _bytes(value: Any) -> int:
    """Of a tensor, whose own parts (codes and scales of one in 8 bits) count in its place; 0 of a number or a step."""
    if not isinstance(value, torch.Tensor) or value.numel() == 1:
        return 0
    parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
    return sum(_bytes(getattr(value, part)) for part in parts) if parts else value.numel() * value.element_size()
