"""The next token from logits: the likeliest, or one drawn from the likeliest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from the smallest set of at least top_p."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):
            raise ValueError(
                f"--temperature {self.temperature} is not allowed; it must be 0 (the likeliest token) or from 1e-6 on"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed} is not allowed; it must be from 0 to {2**63 - 1}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} is not allowed; it must be above 0 and at most 1")


def sampler(sampling: Sampling) -> Callable[[Tensor], int]:
    """A function from logits [V] to the next token."""
    generator = torch.Generator().manual_seed(sampling.seed)

    def choose(logits: Tensor) -> int:
        if not bool(torch.isfinite(logits.max())):
            raise ValueError("the model's logits are not finite; python -m qat.evaluate says more about it")
        if sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = (logits.float() / sampling.temperature).softmax(0)
        kept, ids = nucleus(probabilities, sampling.top_p)
        return int(ids[torch.multinomial(kept, 1, generator=generator)])

    return choose


def nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """(probabilities, ids) of the smallest set of likeliest tokens whose sum reaches top_p (arXiv:1904.09751).

    Looks at the 256 likeliest first: sorting a large vocabulary costs more than a small model's step.
    """
    size = len(probabilities)
    if top_p == 1:
        return probabilities, torch.arange(size)
    for count in (min(256, size), size):
        kept, ids = probabilities.topk(count)
        before = kept.cumsum(0) - kept
        if count == size or float(before[-1] + kept[-1]) >= top_p:
            break
    inside = before < top_p
    return kept[inside], ids[inside]
