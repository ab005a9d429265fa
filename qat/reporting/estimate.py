"""What a run would take: memory of weights, optimizer and activations, tokens; for `--dry-run`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.config import TrainConfig
from qat.conversion.layers import bitlinears, full_precision_bf16
from qat.planning.choosing import choice_of, resting_bytes, state_bytes
from qat.planning.facts import facts_of, of_weights, units_of
from qat.planning.memory import Student, parts
from qat.planning.speed import bytes_sent
from qat.quantizers.layouts import get_layout
from qat.reporting import updates

MIB = 2**20


def lines(
    config: TrainConfig,
    base: nn.Module,
    student: nn.Module,
    teacher: nn.Module | None,
    sample: Mapping[str, Any],
    optimizer: Any,
) -> list[str]:
    """What a person wants to know before starting.

    Args:
        teacher: the one that the losses ask for.
        sample: one sequence of data.sequence_length tokens with its labels, as the model's arguments.
        optimizer: its factory of parameter groups.
    """
    parameters = sum(p.numel() for p in student.parameters())
    taught, (memory, sent) = teacher_bytes(teacher), _of_a_device(config, student, teacher, sample, optimizer)
    linears, packed = linear_bytes(student, config.export.layout)
    codes, whole = sum(layer.weight.numel() for _, layer in bitlinears(student)), full_precision_bf16(base)
    return [
        f"parameters      {parameters:,}, of which {codes:,} become codes",
        f"size            {whole / MIB:.1f} MiB in bf16; linear layers {linears / MIB:.2f} -> {packed / MIB:.2f} MiB",
        f"memory          about {sum(memory.values()) / MIB:,.0f} MiB a device: {_parts(memory)}",
        *([f"on the wire     {sent / MIB:,.1f} MiB sent by each device in a step"] if sent else []),
        f"updates         {updates.in_words(config)}",
        *(f"warning         {said}" for said in updates.warnings(config)),
        *annealing(config),
        *([f"teacher         {_teaching(taught)}"] if taught else []),
    ]


def _of_a_device(
    config: TrainConfig, student: nn.Module, teacher: nn.Module | None, sample: Mapping[str, Any], optimizer: Any
) -> tuple[dict[str, int], int]:
    """Memory of the fullest device, part by part, and the bytes that it sends in a step."""
    choice = choice_of(config, state_bytes(optimizer), resting_bytes(optimizer))
    length = int(sample["input_ids"].shape[1])
    facts = facts_of(student, units_of(student), sample, mixed=choice.mixed, only=choice.checkpointing)
    learned = Student(facts, None if teacher is None else of_weights(teacher, length))
    return parts(learned, choice), bytes_sent(learned, choice)


def _parts(memory: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / MIB:,.0f}" for name, size in memory.items())


def annealing(config: TrainConfig) -> list[str]:
    """How long codes are soft, where they are."""
    optim, total = config.optim, config.trainer.max_steps
    if not optim.annealed:
        return []
    soft = optim.hard_from(total)
    held = " that are held" if optim.held_from(total) < total else ""
    words = f"soft from {optim.anneal_from:g} to {optim.anneal_to:g} in {soft:,} steps, then {total - soft:,} with codes{held}"
    return [f"weights         {words}"]


def _teaching(size: int) -> str:
    """What the teacher costs, and how to do without one."""
    return f"a second model in full precision, {size / MIB:,.0f} MiB and a forward pass a step; distill=none trains without"


def teacher_bytes(teacher: nn.Module | None) -> int:
    """Bytes of the teacher's parameters; 0 without one."""
    return sum(p.numel() * p.element_size() for p in teacher.parameters()) if teacher is not None else 0


def linear_bytes(student: nn.Module, layout: str) -> tuple[int, int]:
    """Bytes of the converted layers' weights in bf16, and of their packed codes."""
    form = get_layout(layout)
    layers = [layer for _, layer in bitlinears(student)]
    packed = sum(layer.out_features * form.row_bytes(layer.in_features * layer.config.planes) for layer in layers)
    return sum(2 * layer.weight.numel() for layer in layers), packed


def activation_bytes(student: nn.Module, sample: Mapping[str, Any]) -> int:
    """Bytes that autograd saves for a batch, parameters left out; each storage once."""
    seen = {p.untyped_storage().data_ptr() for p in student.parameters()}
    total = 0

    def save(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = student(**sample).loss
    del loss
    return total
