"""The plan of a run on devices that are not here: a model without weights, an optimizer's state as measured on a small matrix."""

from __future__ import annotations

from dataclasses import replace

import torch

from qat.config import TrainConfig
from qat.conversion import walker as conversion
from qat.losses import needs
from qat.models.weightless import faked, weightless
from qat.planning.choosing import choice_of, resting_bytes, state_bytes
from qat.planning.devices import device
from qat.planning.facts import facts_of, of_weights, units_of
from qat.planning.memory import Student
from qat.planning.table import print_table
from qat.training.plugins import optimizer_factory
from qat.training.trainings import check_teacher


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
    print_table(student, choice_of(config, state_bytes(factory), resting_bytes(factory)), kind, tokens)


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
    if config.model.teacher == "shared":
        return Student(facts, facts)
    return Student(facts, of_weights(weightless(config.model, config.model.teacher), facts.length))
