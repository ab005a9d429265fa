"""What a batch asks of a model, and which of its outputs are compared with what: one view for each task.

A language model predicts each token from those before it, so its rows are shifted by one; a classifier predicts one label an
example. Losses see rows and targets and do not know which.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qat.losses.logits import predicted, predicting

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class View:
    """How a task's batches are read."""

    inputs: Callable[[nn.Module, Batch], dict[str, Any]]
    """(model, batch) -> the model's keyword arguments."""
    rows: Callable[[Tensor, Batch], Tensor]
    """(logits, batch) -> those that are compared, float32 [P, V]."""
    targets: Callable[[Batch], Tensor]
    """What they predict, int64 [P]."""
    predicts: Callable[[Batch], Tensor]
    """bool: which positions' states make the rows, as `qat.losses.record.Seen` has it."""
    shares: Callable[[Batch], Tensor | None]
    """What each of these positions counts in losses on states, float32 [P]; None: each counts 1."""
    words: bool = True
    """Whether tokens are predicted, so that the exponential of a cross-entropy is a perplexity."""


def arguments(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Of a classifier: what its forward takes by name (BERT takes token types, Llama does not), without a cache."""
    names = _names(type(model))  # type: ignore[arg-type]
    taken = {key: value for key, value in batch.items() if key in names and isinstance(value, Tensor) and key != "labels"}
    return {**taken, "use_cache": False} if "use_cache" in names else taken


@cache
def _names(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def _text_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    inputs = {key: value for key, value in batch.items() if key != "labels" and isinstance(value, Tensor)}
    return {**inputs, "use_cache": False}


def _attended(batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _shares(batch: Batch) -> Tensor:
    """An example counts 1 however long its text is, as it does in every other loss."""
    mask = _attended(batch)
    return (mask / mask.sum(1, keepdim=True))[mask]


TEXT = View(
    _text_inputs,
    lambda logits, batch: predicted(logits, batch["labels"])[0],
    lambda batch: batch["labels"][:, 1:][predicting(batch["labels"])],
    lambda batch: predicting(batch["labels"]),
    lambda batch: None,
)
LABELS = View(arguments, lambda logits, batch: logits.float(), lambda batch: batch["labels"], _attended, _shares, words=False)
