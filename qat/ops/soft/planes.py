"""A float weight times int8 activations by two int8 matmuls, where the processor's are several times as fast as float32's.

A row of the weight is s a + r b with codes a, b in -127 ... 127: those of the row, and those of what they leave. That is 15 bits
of the row's largest weight: the output's relative error is 1.4e-5, where bfloat16 has 2e-3. The activations are codes already,
and the sums are exact. One plane alone would have bfloat16's error, and three are no faster than float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.ops import cpu
from qat.ops.operands import float_bias

LEAST_WEIGHTS, LEAST_TOKENS, MAX_WIDTH = 2**18, 64, 2**17
"""Smaller matmuls take no longer than making the planes; sums of wider ones leave int32."""


def serves(x: Tensor, w: Tensor) -> bool:
    """Whether planes are faster than a matmul in x's dtype, which is float32."""
    n, k = w.shape
    large = n * k >= LEAST_WEIGHTS and x.numel() >= LEAST_TOKENS * k and k <= MAX_WIDTH
    return large and x.dtype == torch.float32 and cpu.compiled() and cpu.isa() == "avx512"  # a path that has int8 products


def linear(codes: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(codes * scale) @ weight^T + bias float32 [..., N] for int8 [..., K], float32 [..., 1], float32 [N, K] and [N]."""
    high, coarse, low, fine = torch.ops.qat.cpu_planes(weight.contiguous())
    rows = codes.reshape(-1, codes.shape[-1])
    products = torch._int_mm(rows, high.t()), torch._int_mm(rows, low.t())
    y = torch.ops.qat.cpu_join_planes(*products, coarse, fine, scale.reshape(-1, 1).contiguous(), float_bias(bias))
    return y.view(*codes.shape[:-1], weight.shape[0])
