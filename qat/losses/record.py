"""What a loss is given, what it returns, and what its row in the table says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from qat.config import DistillConfig

Pair = tuple[Tensor, int]
"""A sum over the predicted tokens, in nats or the loss's own unit, scalar float32, and their number: means are made of sums
over a whole optimizer step, so that no number depends on how its sequences were cut into batches."""


class Seen(NamedTuple):
    """One batch as losses see it: P tokens are predicted, of B sequences of L tokens, over a vocabulary of V."""

    rows: Tensor
    """The student's logits float32 [P, V]."""
    targets: Tensor
    """The tokens int64 [P] that they predict."""
    predicts: Tensor
    """bool [B, L - 1]: which positions predict; of hidden states h [B, L, H], `h[:, :-1][predicts]` are those of `rows`."""
    teacher_rows: Tensor | None
    """The teacher's logits float32 [P, V], where a loss asks for a teacher."""
    student: Any
    """All that the student's forward gave; `hidden_states` and `attentions` where a loss asks for them."""
    teacher: Any
    """The same of the teacher."""
    residuals: Sequence[tuple[Tensor, Tensor]] = ()
    """Of each layer the residual stream after it, [B, L, H] of student and teacher, where a loss asks for them."""


@dataclass(frozen=True)
class Loss:
    """A row: `function` returns a `Pair`, and `weight` is the key of DistillConfig that turns the loss on."""

    function: Callable[[Seen, DistillConfig], Pair]
    weight: str
    teacher: bool = False
    """It compares with a teacher."""
    hidden_states: bool = False
    """It reads the hidden states of all layers."""
    residuals: bool = False
    """It compares the residual streams of student and teacher, layer by layer."""
    attentions: bool = False
    """It reads the attention weights of all layers."""
    until: str | None = None
    """The key of the share of the run at which its weight has fallen to 0."""
    begins: str | None = None
    """The key of the share of the run from which it has a weight."""
    reported: bool = False
    """It is measured and logged where its weight is 0, too."""
