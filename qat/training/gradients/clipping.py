"""Gradients clipped by their norm, which is summed in float64: the same however their elements are ordered, split or sharded.

torch's `clip_grad_norm_` sums squares in float32, so several devices that hold a shard each get another last bit of the norm
than one that holds all, scale their gradients by another factor, and part ways step by step. In float64 the order is lost in
the rounding of the factor to float32. What is not finite makes the norm so, and with it the gradients: the weights then say so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qat.ops import cpu
from qat.parallel import waiting
from qat.training.strategies.shards import local

_LEAST = 1e-6
"""Added to the norm, as torch does: gradients of 0 are not divided by."""


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The norm, float64 [] on their device, of all elements of the gradients [...], of any floating dtype and on one device.

    Of gradients that lie in parts on several devices it is that of the whole ones: all of their devices must ask.
    """
    divided = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if not divided:
        return _norm(plain)
    squares = _norm([local(gradient) for gradient in divided]).square()
    dist.all_reduce(squares, group=divided[0].device_mesh.get_group())
    return (squares + _norm(plain).square() if plain else squares).sqrt()


def _norm(gradients: list[Tensor]) -> Tensor:
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
    if waiting.waits(norm) or factor.item() != 1.0:  # NaN too
        torch._foreach_mul_(
            [local(gradient) for gradient in gradients], factor
        )  # a tensor: a number would be rounded to bfloat16
    return norm
