"""Language models: text, chats or samples; the loss of the next token; perplexity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qat.config import TrainConfig
from qat.data.opening import open_data as open_data
from qat.data.opening import probe_batch
from qat.losses.views import TEXT
from qat.models import hub as models
from qat.models.vocabulary import check_same_words
from qat.training.stages import Measure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat.data import QATData

view = TEXT
measure = Measure.of
probe = probe_batch


def load_model(config: TrainConfig, data: QATData | None) -> PreTrainedModel:
    """As the hub has it."""
    return models.load_model(config.model)


def load_teacher(config: TrainConfig, base: PreTrainedModel) -> PreTrainedModel:
    """Another language model of the same vocabulary."""
    teacher = models.load_model(config.model, config.model.teacher)
    if teacher.config.vocab_size != base.config.vocab_size:
        raise ValueError(
            f"model.teacher={config.model.teacher} has {teacher.config.vocab_size} tokens in its vocabulary,"
            f" but the student has {base.config.vocab_size}; logits can only be compared over one vocabulary"
        )
    check_same_words(config.model)
    return teacher


def ready(config: TrainConfig) -> bool:
    """Always: a language model's head is its checkpoint's."""
    return True


def sample(config: TrainConfig) -> dict[str, Any]:
    """Any tokens."""
    tokens = torch.zeros(1, config.data.sequence_length, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens, "use_cache": False}


def scores(data: QATData) -> None:
    """Nothing beside the losses."""
