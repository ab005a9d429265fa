"""Losses on logits, as sums over the predicted tokens, in float32.

Cross-entropy with the text and, from a full-precision teacher, tau^2 * KL(p_teacher || p_student) on logits divided by
tau (Hinton et al., arXiv:1503.02531, section 2; BitDistill, arXiv:2510.13998, eq. 12).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qat.config import DistillConfig
from qat.losses.positions import positions
from qat.losses.record import Pair, Seen

IGNORE = -100


def predicting(labels: Tensor) -> Tensor:
    """Which positions predict a token, bool [B, L - 1], of labels int64 [B, L]: i predicts token i + 1, -100 is not predicted."""
    return labels[:, 1:] != IGNORE


def predicted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [P, V] in float32 and the tokens [P] they predict, of logits [B, L, V] and labels int64 [B, L]."""
    index = positions(predicting(labels))
    return predicting_rows(logits, index), target_tokens(labels, index)


def predicting_rows(logits: Tensor, index: Tensor | None) -> Tensor:
    """The first of `predicted`, for those `positions`."""
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    return (rows if index is None else rows[index]).float()


def target_tokens(labels: Tensor, index: Tensor | None) -> Tensor:
    """The second."""
    targets = labels[:, 1:].reshape(-1)
    return targets if index is None else targets[index]


def cross_entropy(seen: Seen, distill: DistillConfig) -> Pair:
    """Negative log-likelihood of the targets, in nats; 0 where P is 0."""
    if distill.kl_chunk:
        return seen.chunked(distill)[0], seen.targets.numel()
    return F.nll_loss(seen.log_probs, seen.targets, reduction="sum"), seen.targets.numel()


def kl(seen: Seen, distill: DistillConfig) -> Pair:
    """tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)), in nats; 0 where P is 0."""
    if distill.kl_chunk:
        return seen.chunked(distill)[1], seen.targets.numel()
    assert seen.teacher_rows is not None
    if distill.temperature == 1:
        return _divergence(seen.log_probs, F.log_softmax(seen.teacher_rows, -1)), seen.targets.numel()
    return divergence(seen.rows, seen.teacher_rows, distill.temperature), seen.targets.numel()


def divergence(rows: Tensor, teacher_rows: Tensor, temperature: float) -> Tensor:
    """The sum over rows [P, V] of tau^2 * KL(teacher || student), a scalar."""
    student, teacher = (F.log_softmax(one / temperature, -1) for one in (rows, teacher_rows))
    return _divergence(student, teacher) * temperature**2


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Of logarithms of probabilities [P, V]."""
    return F.kl_div(student, teacher, reduction="sum", log_target=True)
