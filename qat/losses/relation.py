"""Attention relation (MiniLMv2, arXiv:2012.15828, section 3.1; BitDistill, arXiv:2510.13998, eq. 13).

Of the queries, the keys and the values of one layer: cut into R relation heads of width d, the scaled products of all tokens
with each other, softmax(A A^T / sqrt(d)), are a distribution for each token and head, compared with the teacher's.
R is not the number of attention heads: fewer keys than queries, or a teacher of another width, are cut into the same R.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.config import DistillConfig
from qat.losses.record import Pair, Seen


def relation(seen: Seen, distill: DistillConfig) -> Pair:
    """KL(teacher || student) of relations, in nats: a sum over queries, keys and values, a mean over heads; 0 where P is 0."""
    assert distill.relation_heads is not None
    terms = [_divergence(mine, theirs, distill.relation_heads, seen) for mine, theirs in seen.projections]
    return torch.stack(terms).sum(), seen.targets.numel()


def _divergence(mine: Tensor, theirs: Tensor, heads: int, seen: Seen) -> Tensor:
    student, teacher = (seen.take(relations(one, heads, seen.attended)) for one in (mine, theirs))
    if seen.shares is None:
        return F.kl_div(student, teacher, reduction="sum", log_target=True) / heads
    rows = F.kl_div(student, teacher, reduction="none", log_target=True).sum((-1, -2))
    return (rows * seen.shares).sum() / heads


def settled(distill: DistillConfig, student: Any) -> DistillConfig:
    """With the relation heads that the loss will use: the model's attention heads where `relation_heads` is null."""
    if not distill.relation or distill.relation_heads is not None:
        return distill
    heads = getattr(student.config.get_text_config(), "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ValueError(f"{type(student).__name__} does not say how many attention heads it has; set distill.relation_heads")
    return replace(distill, relation_heads=heads)


def relations(states: Tensor, heads: int, attended: Tensor | None) -> Tensor:
    """log softmax(A A^T / sqrt(d)) in float32, [B, L, heads, L], of a projection [B, L, heads * d]; padding is no neighbour."""
    split = states.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = split @ split.mT * split.shape[-1] ** -0.5
    if attended is not None:
        scores = scores.masked_fill(~attended[:, None, None, :], torch.finfo(scores.dtype).min)  # -inf - -inf would be NaN
    return F.log_softmax(scores, -1).transpose(1, 2)
