"""The losses of training, a row each; the loss of a step is the sum of each row's mean over the step's tokens times its weight.

A row says what it needs, and nobody asks for its name: whether a teacher is loaded and whether models are asked for hidden
states follows from the rows whose weight in `distill` is above 0.
"""

from __future__ import annotations

from qat.config import DistillConfig
from qat.losses import hidden, logits, relation
from qat.losses.record import Loss

LOSSES = {
    "ce": Loss(logits.cross_entropy, weight="ce", reported=True, whole_rows=False),
    "kl": Loss(logits.kl, weight="kl", teacher=True, until="kl_until", begins="kl_from", whole_rows=False),
    "hidden": Loss(hidden.relative, weight="hidden", teacher=True, residuals=True, whole_rows=False, until="hidden_until"),
    "cosine": Loss(hidden.cosine, weight="cosine", teacher=True, residuals=True, whole_rows=False),
    "relation": Loss(relation.relation, weight="relation", teacher=True, projections=True, whole_rows=False),
}


def active(distill: DistillConfig) -> dict[str, Loss]:
    """The rows that training minimizes."""
    return {name: row for name, row in LOSSES.items() if getattr(distill, row.weight) > 0}


def weight_at(distill: DistillConfig, name: str, step: int, total: int) -> float:
    """A row's weight at `step` (0-based) of `total`: 0 before its beginning, and falling in a line to 0 at its end."""
    row = LOSSES[name]
    begin, end = (getattr(distill, key) if key else None for key in (row.begins, row.until))
    share = step / max(total, 1)
    falling = 1.0 if end is None else max(0.0, 1 - share / end)
    return float(getattr(distill, row.weight)) * falling * (begin is None or share >= begin)


def needs(distill: DistillConfig, what: str) -> list[str]:
    """The active rows that need a `teacher`, `residuals`, `projections`, `hidden_states` or `attentions`."""
    return [name for name, row in active(distill).items() if getattr(row, what)]


def setting(distill: DistillConfig, name: str) -> str:
    """What turns a row on, for messages: `distill.kl=0.5`."""
    key = LOSSES[name].weight
    return f"distill.{key}={getattr(distill, key)}"


def measured(distill: DistillConfig) -> dict[str, Loss]:
    """The active rows, and those that are reported whatever their weight, in the table's order."""
    return {name: row for name, row in LOSSES.items() if row.reported or name in active(distill)}
