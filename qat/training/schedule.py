"""Schedules as pure functions of the optimizer step, so that resuming needs the step and nothing else.

The two-stage schedule is that of BitNet b1.58 ("The Era of 1-bit LLMs: Training Tips, Code and FAQ", 2024): the
learning rate drops abruptly half way and weight decay is on in the first half only.
"""

from __future__ import annotations

import math

SECOND_STAGE = 2 / 3


def lr_factor(step: int, total: int, kind: str, warmup: int = 0, final: float = 0.0) -> float:
    """The learning rate at `step` (0-based) of `total`, as a share of its peak."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    linear = 1 - (1 - final) * progress
    return linear if kind == "linear" or not second_stage(step, total) else linear * SECOND_STAGE


def weight_decay_factor(step: int, total: int, kind: str) -> float:
    """The weight decay at `step` as a share of its setting: 0 in the second half of `two_stage`, else 1."""
    return 0.0 if kind == "two_stage" and second_stage(step, total) else 1.0


def second_stage(step: int, total: int) -> bool:
    """Whether `step` lies in the second half."""
    return step >= total / 2


def lambda_at(step: int, steps: int) -> float:
    """The share of quantization blended in at `step`: min(step / steps, 1), and 1 where steps is 0."""
    return 1.0 if steps == 0 else min(step / steps, 1.0)


def beta_at(step: int, total: int, first: float, last: float, share: float) -> float | None:
    """The sharpness of soft codes at `step` of `total`: first (last / first)^(t / (share total)), None from share total on.

    The rest of the run trains with codes, straight through, so that scales, norms and embeddings settle with what is stored.
    """
    progress = step / (share * total)
    return first * (last / first) ** progress if progress < 1 else None
