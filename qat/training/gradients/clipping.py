"""Gradients clipped by their norm, which is summed in float64: the same however their elements are ordered, split or sharded.

torch's `clip_grad_norm_` sums squares in float32, so several devices that hold a shard each get another last bit of the norm
than one that holds all, scale their gradients by another factor, and part ways step by step. In float64 the order is lost in
the rounding of the factor to float32. What is not finite makes the norm so, and with it the gradients: the weights then say so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qat.ops import cpu

_LEAST = 1e-6
"""Added to the norm, as torch does: gradients of 0 are not divided by."""


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The norm, float64 [] on their device, of all elements of the gradients [...], of any floating dtype and on one device.

    Shards' norms are put together as sqrt(sum of squares), in float64 too.
    """
    squares = cpu.square_sum(gradients) if gradients[0].is_cpu else None
    if squares is not None:
        return torch.tensor(math.sqrt(squares), dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)))


def clip(parameters: Iterable[nn.Parameter], most: float) -> Tensor | None:
    """Scale the parameters' gradients in place so that their norm is at most `most`; the norm before it, or None without any."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    norm = gradient_norm(gradients)
    factor = (most / (norm + _LEAST)).clamp(max=1.0).float()
    if not norm.is_cpu or factor.item() != 1.0:  # NaN too; asking a GPU for the value would wait for it
        torch._foreach_mul_(gradients, factor)  # a tensor: as a number it would be rounded to bfloat16 with such gradients
    return norm
