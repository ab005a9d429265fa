"""Losses on the residual stream after each layer, before the final norm; a mean over layers, a sum over the predicted tokens.

`relative`: |h_S - h_T|^2 / |h_T|^2, which needs no projection as student and teacher have one shape, and weighs every layer alike
although norms grow by depth. `cosine`: 1 - cos(h_S, h_T), which leaves the norms free.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.config import DistillConfig
from qat.losses.record import Pair, Seen

TINY = 1e-12
"""Below it a square norm counts as it: of a state that is 0."""


def relative(seen: Seen, distill: DistillConfig) -> Pair:
    """The square distance of student and teacher as a share of the teacher's square norm; 0 where P is 0."""
    distances = (_Relative.apply(mine, theirs, seen.shares) for mine, theirs in _rows(seen))
    return _mean(distances, seen), seen.targets.numel()


def cosine(seen: Seen, distill: DistillConfig) -> Pair:
    """1 - the cosine of the angle between student and teacher; 0 where P is 0."""
    angles = (_angles(mine, theirs, seen.shares) for mine, theirs in _rows(seen))
    return _mean(angles, seen), seen.targets.numel()


def _angles(mine: Tensor, theirs: Tensor, shares: Tensor | None) -> Tensor:
    cosines = F.cosine_similarity(mine.float(), theirs.float(), dim=-1)
    return cosines.numel() - cosines.sum() if shares is None else ((1 - cosines) * shares).sum()


def _mean(terms: Any, seen: Seen) -> Tensor:
    return torch.stack([*terms]).sum() / len(seen.residuals)


def _rows(seen: Seen) -> list[tuple[Tensor, Tensor]]:
    """Of each layer the states [P, H] that predict; where all tokens do, views [B, L - 1, H]."""
    if seen.shares is None and seen.targets.numel() == seen.predicts.numel():
        width = seen.predicts.shape[1]
        return [(mine[:, :width], theirs[:, :width]) for mine, theirs in seen.residuals]
    return [(seen.take(mine), seen.take(theirs)) for mine, theirs in seen.residuals]


class _Relative(torch.autograd.Function):
    """sum_p share_p |a_p - b_p|^2 / |b_p|^2 of a, b [..., H] in float32; no copy of either is kept: autograd would keep a - b."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, theirs: Tensor, shares: Tensor | None) -> Tensor:
        difference, target = mine.float() - theirs.float(), theirs.float()
        norms = torch.linalg.vecdot(target, target).clamp_min(TINY)
        norms = norms if shares is None else norms / shares
        ctx.save_for_backward(mine, theirs, norms)
        return (torch.linalg.vecdot(difference, difference) / norms).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        mine, theirs, norms = ctx.saved_tensors
        return (mine.float() - theirs.float()).mul_((2 * gradients[0] / norms)[..., None]).to(mine.dtype), None, None
