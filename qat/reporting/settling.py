"""What a configuration leaves open until more is known: each function gives one in which that is a number.

The saved configuration is the settled one, so that a resumed run does not depend on rules that may change. A budget in tokens or
passes stays beside the steps that it makes, and is counted anew where it is changed.
"""

from __future__ import annotations

import math
from dataclasses import replace

from qat.config import TrainConfig, TrainerConfig
from qat.data import QATData
from qat.data.mixture import Mixture
from qat.reporting import updates
from qat.tasks import TASKS


def settled(config: TrainConfig) -> TrainConfig:
    """What the configuration alone decides: whether codes are soft, and the steps of a budget in tokens.

    Raises:
        ValueError: a budget of less than one update.
    """
    if config.optim.anneal == "auto":
        soft = all(quant.quantizer.soft is not None or quant.quantizer.sharpened for quant in config.quant.variants())
        config = replace(config, optim=replace(config.optim, anneal="soft" if soft else "none"))
    if config.trainer.max_tokens is None:
        return config
    each, tokens = updates.tokens_per_update(config), config.trainer.max_tokens
    if not TASKS[config.task].whole:
        raise ValueError(f"trainer.max_tokens does not fit task={config.task}, whose sequences differ; use trainer.max_epochs")
    if tokens < each:
        raise ValueError(f"trainer.max_tokens={tokens} is less than one update of {each:,} tokens")
    return with_steps(config, tokens // each)


def with_data(config: TrainConfig, data: QATData | None) -> TrainConfig:
    """The steps of a budget in passes over the training sequences.

    Raises:
        ValueError: the text is a mixture, whose parts have passes of their own.
    """
    epochs = config.trainer.max_epochs
    if epochs is None:
        return config
    if config.data.kind == "mixed":
        raise ValueError("trainer.max_epochs does not fit data=mixed, whose parts have passes of their own; use max_tokens")
    count = len(data.train) if data is not None else math.ceil(config.data.selfgen.tokens / config.data.sequence_length)
    config = with_steps(config, max(1, round(epochs * count / updates.sequences_per_update(config))))
    if data is not None:
        data.total_batches = config.trainer.max_steps * config.trainer.accumulate_grad_batches
    return config


def with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """So many optimizer steps; what does not fit them is refused once more."""
    config = replace(config, trainer=replace(config.trainer, max_steps=steps))
    config.check()
    return config


def validated_once(trainer: TrainerConfig) -> bool:
    """Whether the validation at the last step is the run's only one, as the interval is longer."""
    return trainer.val_every is not None and trainer.val_every > trainer.max_steps


def passes(config: TrainConfig, data: QATData) -> str:
    """How often the budget goes over the training sequences, in words; of a mixture nothing, as its parts differ."""
    if isinstance(data.train, Mixture):
        return ""
    sequences = config.trainer.max_steps * updates.sequences_per_update(config)
    return f"{sequences / len(data.train):.3g} passes over {data.name}, {len(data.train):,} sequences"
