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

from qat.losses.logits import predicting, predicting_rows, target_tokens
from qat.losses.positions import positions

Batch = Mapping[str, Any]
PICKED, UNPADDED = "picked", "unpadded"
"""Keys that `View.known` adds: `positions` of what is compared, and whether no position of the attention mask is padding."""


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
    """bool: which positions' states make the rows, as `qat.losses.record.Seen` has it; a batch that `known` went through knows
    them as an index."""
    shares: Callable[[Batch], Tensor | None]
    """What each of these positions counts in losses on states, float32 [P]; None: each counts 1."""
    words: bool = True
    """Whether tokens are predicted, so that the exponential of a cross-entropy is a perplexity."""

    def known(self, batch: Batch) -> dict[str, Any]:
        """The batch with what a step would have to ask a GPU for: looked at while it is on the CPU."""
        mask = batch.get("attention_mask")
        unpadded = {} if mask is None else {UNPADDED: bool(mask.all())}
        return {**batch, PICKED: positions(self.predicts(batch)), **unpadded}

    def index(self, batch: Batch) -> Tensor | None:
        """`positions` of what `predicts` says."""
        return batch[PICKED] if PICKED in batch else positions(self.predicts(batch))


def arguments(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Of a classifier: what its forward takes by name (BERT takes token types, Llama does not), without a cache."""
    names = _names(type(model))  # type: ignore[arg-type]
    taken = {key: value for key, value in batch.items() if key in names and isinstance(value, Tensor) and key != "labels"}
    return {**taken, "use_cache": False} if "use_cache" in names else taken


@cache
def _names(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def _text_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    inputs = {key: value for key, value in batch.items() if key not in ("labels", PICKED) and isinstance(value, Tensor)}
    return {**inputs, "use_cache": False}


def _attended(batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _shares(batch: Batch) -> Tensor:
    """An example counts 1 however long its text is, as it does in every other loss."""
    mask = _attended(batch)
    shares, index = (mask / mask.sum(1, keepdim=True)).flatten(), LABELS.index(batch)
    return shares if index is None else shares[index]


def _text_rows(logits: Tensor, batch: Batch) -> Tensor:
    return predicting_rows(logits, TEXT.index(batch))


def _text_targets(batch: Batch) -> Tensor:
    return target_tokens(batch["labels"], TEXT.index(batch))


TEXT: View = View(
    _text_inputs,
    _text_rows,
    _text_targets,
    lambda batch: predicting(batch["labels"]),
    lambda batch: None,
)
LABELS: View = View(
    arguments, lambda logits, batch: logits.float(), lambda batch: batch["labels"], _attended, _shares, words=False
)
