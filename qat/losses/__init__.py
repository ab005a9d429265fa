"""The losses of training, a row each; the loss of a step is the sum of each row's mean over the step's tokens times its weight.

A row says what it needs, and nobody asks for its name: whether a teacher is loaded and whether models are asked for hidden
states follows from the rows whose weight in `distill` is above 0.
"""

from __future__ import annotations

from qat.config import DistillConfig
from qat.losses import logits
from qat.losses.record import Loss

LOSSES = {
    "ce": Loss(logits.cross_entropy, weight="ce", reported=True),
    "kl": Loss(logits.kl, weight="kl", teacher=True),
}


def active(distill: DistillConfig) -> dict[str, Loss]:
    """The rows that training minimizes."""
    return {name: row for name, row in LOSSES.items() if getattr(distill, row.weight) > 0}


def needs(distill: DistillConfig, what: str) -> list[str]:
    """The active rows that need a `teacher`, `hidden_states` or `attentions`."""
    return [name for name, row in active(distill).items() if getattr(row, what)]


def measured(distill: DistillConfig) -> dict[str, Loss]:
    """The active rows, and those that are reported whatever their weight, in the table's order."""
    return {name: row for name, row in LOSSES.items() if row.reported or name in active(distill)}
