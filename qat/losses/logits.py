"""Losses of quantization-aware training as pure functions on logits.

Cross-entropy with the text and, from a full-precision teacher, tau^2 * KL(p_teacher || p_student) on logits divided by
tau (Hinton et al., arXiv:1503.02531, section 2; BitDistill, arXiv:2510.13998, eq. 12). Both are means over the
predicted tokens, in float32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def predicted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [P, V] in float32 and the tokens [P] they predict, of logits [B, L, V] and labels int64 [B, L].

    Position i predicts token i + 1; labels of -100 are not predicted.
    """
    targets = labels[:, 1:].reshape(-1)
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    keep = targets != IGNORE
    if not bool(keep.all()):
        rows, targets = rows[keep], targets[keep]
    return rows.float(), targets


def cross_entropy(rows: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood, nats a token, of logits [P, V] and targets int64 [P]; 0 where P is 0."""
    return F.cross_entropy(rows, targets, reduction="sum") / max(targets.numel(), 1)


def logits_kl(rows: Tensor, teacher_rows: Tensor, temperature: float) -> Tensor:
    """tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)), nats a token, of logits [P, V]; 0 where P is 0."""
    student = F.log_softmax(rows / temperature, -1)
    teacher = F.log_softmax(teacher_rows / temperature, -1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * (temperature**2 / max(rows.shape[0], 1))
