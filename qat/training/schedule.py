"""Schedules as pure functions of the optimizer step, so that resuming needs the step and nothing else.

The two-stage schedule is that of BitNet b1.58 ("The Era of 1-bit LLMs: Training Tips, Code and FAQ", 2024): the
learning rate drops abruptly half way and weight decay is on in the first half only.
"""

from __future__ import annotations

import math

SECOND_STAGE = 2 / 3
STAGES = {"two_stage": 0.5}
"""Schedule -> the share of the run at which its first stage ends, and weight decay with it."""


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


def weight_decay_factor(step: int, total: int, kind: str, until: float | None = None) -> float:
    """The weight decay at `step` as a share of its setting: 0 from the share `until` of the run on, else 1.

    Where nothing is said, `two_stage` has it until half way and the others to the end.
    """
    end = (STAGES.get(kind, 1.0) if until is None else until) * total
    return 0.0 if step >= end else 1.0


def second_stage(step: int, total: int) -> bool:
    """Whether `step` lies in the second half."""
    return step >= STAGES["two_stage"] * total


def lambda_at(step: int, steps: int, kind: str = "linear", block: int = 0, blocks: int = 1) -> float:
    """The share of quantization blended in at `step`, 1 from `steps` on: a row of LAMBDAS.

    Args:
        block: which of `blocks` (0 is the first) the layer belongs to, for those that do not treat all layers alike.
    """
    return 1.0 if step >= steps else LAMBDAS[kind](step / steps, block, blocks)


def _linear(progress: float, block: int, blocks: int) -> float:
    return progress


def _sigmoid(progress: float, block: int, blocks: int) -> float:
    return 1 / (1 + math.exp(-SLOPE * (progress - 0.5)))


def _layerwise(progress: float, block: int, blocks: int) -> float:
    return min(max(progress * blocks - block, 0.0), 1.0)


SLOPE = 10.0
"""Of the sigmoid: lambda goes from .007 to .993, half of it within the middle fifth of the steps."""
LAMBDAS = {"linear": _linear, "sigmoid": _sigmoid, "layerwise": _layerwise}
"""(share of the steps, block, blocks) -> lambda. `linear` and `sigmoid` are those of Hugging Face's "Fine-tuning LLMs to
1.58bit" (2024), the latter sigma(k (progress - 1/2)); `layerwise` is a linear one for each block, from the first to the last."""


def damping_at(step: int, total: int, peak: float) -> float:
    """The weight of the damping at `step` of `total`: from 0 to its peak by a cosine (arXiv:2203.11086, section 4.2)."""
    return peak * (1 - math.cos(math.pi * min(step / total, 1.0))) / 2


def beta_at(step: int, total: int, first: float, last: float, share: float) -> float | None:
    """The sharpness of soft codes at `step` of `total`: first (last / first)^(t / (share total)), None from share total on.

    The rest of the run trains with codes, straight through, so that scales, norms and embeddings settle with what is stored.
    """
    progress = step / (share * total)
    return first * (last / first) ** progress if progress < 1 else None
