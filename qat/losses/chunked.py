"""Cross-entropy and divergence over a large vocabulary, a few rows at a time.

Of a whole batch autograd keeps several float32 copies of [P, V]: the rows, their log-softmax, the teacher's. Here none is kept:
the backward pass computes each chunk's softmax again, from logits that are there anyway, into the one gradient [N, V]. Cross-
entropy and divergence share a chunk's log-softmax where tau is 1. Rejected: gradients in the forward pass, which would have to
know the weights of both, and could not tell their gradients apart.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy_and_kl(
    logits: Tensor, teacher: Tensor | None, index: Tensor, targets: Tensor, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """Sums over the predicted tokens, float32 scalars: -log p(target), and tau^2 * KL(teacher || student), 0 without a teacher.

    Args:
        logits, teacher: [N, V] of any float type, of all positions.
        index: int64 [P], the positions that predict `targets` int64 [P].
        chunk: rows that are computed at a time.
    """
    return _Chunked.apply(logits, teacher, index, targets, temperature, chunk)  # type: ignore[no-any-return]


def _log_probs(rows: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(rows if temperature == 1 else rows / temperature, -1)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher: Tensor | None, index: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, teacher, index, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ce, kl = logits.new_zeros((), dtype=torch.float32), logits.new_zeros((), dtype=torch.float32)
        for at, wanted in zip(index.split(chunk), targets.split(chunk), strict=True):
            rows = logits[at].float()
            plain = _log_probs(rows, 1.0)
            ce += F.nll_loss(plain, wanted, reduction="sum")
            if teacher is not None:
                mine = plain if temperature == 1 else _log_probs(rows, temperature)
                theirs = _log_probs(teacher[at].float(), temperature)
                kl += F.kl_div(mine, theirs, reduction="sum", log_target=True) * temperature**2
        return ce, kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        logits, teacher, index, targets = ctx.saved_tensors
        ce, kl = gradients
        found = torch.zeros_like(logits)
        for at, wanted in zip(index.split(ctx.chunk), targets.split(ctx.chunk), strict=True):
            rows = logits[at].float()
            plain = rows.softmax(-1)
            slope = plain * ce
            slope[torch.arange(len(at), device=at.device), wanted] -= ce
            if teacher is not None:
                mine = plain if ctx.temperature == 1 else (rows / ctx.temperature).softmax(-1)
                theirs = _log_probs(teacher[at].float(), ctx.temperature).exp_()
                slope += (mine - theirs).mul_(kl * ctx.temperature)
            found[at] = slope.to(found.dtype)
        return found, None, None, None, None, None
