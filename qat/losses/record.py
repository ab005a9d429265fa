"""What a loss is given, what it returns, and what its row in the table says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.config import DistillConfig
from qat.losses.chunked import cross_entropy_and_kl
from qat.losses.positions import positions

Pair = tuple[Tensor, int]
"""A sum over the predicted tokens, in nats or the loss's own unit, scalar float32, and their number: means are made of sums
over a whole optimizer step, so that no number depends on how its sequences were cut into batches."""


@dataclass
class Seen:
    """One batch as losses see it: P tokens are predicted, of B sequences of L tokens, over a vocabulary of V."""

    rows: Tensor
    """The student's logits float32 [P, V]; none of them, [0, V], where all of the losses go by `distill.kl_chunk`."""
    targets: Tensor
    """The tokens int64 [P] that they predict."""
    predicts: Tensor
    """bool [B, L - 1]: which positions predict; of hidden states h [B, L, H], `h[:, :-1][predicts]` are those of `rows`. Of a
    classifier bool [B, L], the positions that are no padding: all of them make the row of their example."""
    teacher_rows: Tensor | None
    """The teacher's logits float32 [P, V], where a loss asks for a teacher."""
    student: Any
    """All that the student's forward gave; `hidden_states` and `attentions` where a loss asks for them."""
    teacher: Any
    """The same of the teacher."""
    residuals: Sequence[tuple[Tensor, Tensor]] = ()
    """Of each layer the residual stream after it, [B, L, H] of student and teacher, where a loss asks for them."""
    projections: Sequence[tuple[Tensor, Tensor]] = ()
    """Of `distill.relation_layer` queries, keys and values, [B, L, N] of student and teacher, where a loss asks for them."""
    attended: Tensor | None = None
    """bool [B, L]: which positions are no padding; None where none is."""
    shares: Tensor | None = None
    """What each state that `predicts` picks counts, float32; None: 1. Of a classifier an example's states count 1 together."""
    picked: tuple[Tensor | None] | None = None
    """`positions` of `predicts`, where that is known; losses ask `index`."""
    _chunked: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    @cached_property
    def index(self) -> Tensor | None:
        """Which positions predict, int64 [P] in the flat order of `predicts`; None: all of them do."""
        return positions(self.predicts) if self.picked is None else self.picked[0]

    def take(self, states: Tensor) -> Tensor:
        """Those states [P, ...] of [B, L or more, ...] that `predicts` picks."""
        flat = states[:, : self.predicts.shape[1]].flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    @cached_property
    def log_probs(self) -> Tensor:
        """log_softmax of `rows`, once for all losses, also where the first to ask is only measured."""
        with torch.set_grad_enabled(self.rows.requires_grad):
            return F.log_softmax(self.rows, -1)

    def chunked(self, distill: DistillConfig) -> tuple[Tensor, Tensor]:
        """Cross-entropy and divergence of `distill.kl_chunk` tokens at a time, computed at once and once."""
        if self._chunked is None:
            index = self._among_all()
            with torch.set_grad_enabled(self.student.logits.requires_grad):
                mine = self.student.logits.flatten(0, 1)
                theirs = None if self.teacher is None else self.teacher.logits.flatten(0, 1)
                rest = distill.temperature, distill.kl_chunk or max(len(index), 1)
                self._chunked = cross_entropy_and_kl(mine, theirs, index, self.targets, *rest)
        return self._chunked

    def _among_all(self) -> Tensor:
        """`index` in the flat order of logits [B, L, V], which have a position more a row."""
        index = self.index
        if index is None:
            index = torch.arange(self.predicts.numel(), device=self.predicts.device)
        return index + index // max(self.predicts.shape[1], 1)


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
    projections: bool = False
    """It compares queries, keys and values of student and teacher in one layer."""
    attentions: bool = False
    """It reads the attention weights of all layers."""
    whole_rows: bool = True
    """It reads `rows` or `teacher_rows` where `distill.kl_chunk` is set, too."""
    until: str | None = None
    """The key of the share of the run at which its weight has fallen to 0."""
    begins: str | None = None
    """The key of the share of the run from which it has a weight."""
    reported: bool = False
    """It is measured and logged where its weight is 0, too."""
