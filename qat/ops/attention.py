"""Causal attention of training for narrow heads, on the CPU: softmax(scale * Q K^T, causal) V and its gradients.

torch's flash attention multiplies blocks by a BLAS, whose inner dimension is the width of a head. At 8 that took two fifths of
a training step of 512 tokens, three times what our kernel takes (csrc/cpu/attention.h); from 64 on the BLAS is the faster one,
so wider heads, masks, other dtypes and lengths that are no multiple of 16 stay torch's. Outputs differ from torch's in rounding
only, and are the same whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.ops import cpu

WIDTHS = (8, 16, 32)
ROWS = 16


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels take these: float32 on the CPU, query [B, H, T, D], key and value [B, KV, T, D], H a multiple of KV."""
    if query.ndim != 4 or query.shape[3] not in WIDTHS or query.shape[2] % ROWS or query.numel() == 0:
        return False
    if any(type(x) is not Tensor or x.dtype != torch.float32 or x.device.type != "cpu" for x in (query, key, value)):
        return False
    batch, heads, tokens, width = query.shape
    fits = key.shape == value.shape == (batch, key.shape[1], tokens, width) and heads % key.shape[1] == 0
    return fits and not torch.compiler.is_compiling() and cpu.compiled() and torch.ops.qat.cpu_attention_serves()


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Float32 [B, H, T, D], [B, T, H, D] in memory, of what `serves` takes; differentiable once."""
    return _CausalAttention.apply(*(_dense(x) for x in (query, key, value)), scale)  # type: ignore[no-untyped-call]


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _CausalAttention(torch.autograd.Function):
    """The weights [B, H, T, T] are made anew in the backward pass, from each row's maximum and sum."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, statistics = torch.ops.qat.cpu_attention(query, key, value, scale)
        ctx.save_for_backward(query, key, value, out, statistics)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.qat.cpu_attention_backward(_dense(grad), *ctx.saved_tensors, ctx.scale), None
