"""Exact products of integer codes by bfloat16 matrix units, for GPUs whose int8 ones are slow: compute capability 10.x.

There int8 `mma.sync` is emulated, about 12 times slower than bfloat16 (pytorch#187094: 1751 us against 139). Codes up to 256 are
exact in bfloat16, and sums below 2^24 in the float32 that they are added in, so the bits are those of the integer kernels.
Rejected: the int8 instructions of tcgen05, which other cards do not have and nobody here could run.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qat.ops import reference

FEW_TOKENS = 16
"""Up to here a packed linear reads its weights, and multiplies in that time, whatever the products cost."""
_EXACT = 2**24 // 128**2  # products of any two codes whose sum is exact


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def preferred(x: Tensor) -> bool:
    """Whether x's device multiplies integers faster this way."""
    return x.is_cuda and _capability(x.device.index)[0] == 10


def _product(a: Tensor, b: Tensor) -> Tensor:
    """float32 [M, N] of bfloat16 [M, K] and [K, N]: as torch's CPU has no such product, tests put one in its place."""
    return torch.mm(a, b, out_dtype=torch.float32)


def linear(x: Tensor, t: Tensor) -> Tensor:
    """x [..., K] times t [N, K]^T in float32, where sums stay below 2^24."""
    return _product(x.reshape(-1, x.shape[-1]).bfloat16(), t.bfloat16().t()).reshape(*x.shape[:-1], t.shape[0])


def rescaled(x_q: Tensor, divisor: Tensor, t: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`reference.integer_linear` of ternary t; None where sums could leave the exact range."""
    if t.shape[1] > reference.EXACT_FLOAT32_WIDTH:
        return None
    return reference.integer_linear(x_q, divisor, t, w_scale, bias, dtype, multiply=linear)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] of int8 [M, K] and [K, N], any codes: parts of K whose sums are exact are added as integers."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    for first in range(0, a.shape[1], _EXACT):
        part = _product(a[:, first : first + _EXACT].bfloat16(), b[first : first + _EXACT].bfloat16())
        total += part.to(torch.int32)
    return total
