"""Straight-through estimates: what is quantized in the forward pass and the identity in the backward one."""

from __future__ import annotations

from torch import Tensor


def mix(full: Tensor, quantized: Tensor, lam: Tensor | float) -> Tensor:
    """full + lam * (quantized - full) with a straight-through gradient: identity with respect to `full`.

    Source: lambda warm-up of the b1.58 fine-tuning recipe; the gradient is Bengio et al., arXiv:1308.3432.
    """
    return full + (lam * (quantized - full)).detach()
