"""The soft ops on the CPU by compiled kernels: Q and its slope in one pass, and activations rounded to their codes in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat.ops import cpu
from qat.ops.operands import DTYPES, MAX_WIDTH
from qat.ops.options import TrainingOptions, WeightOptions, weight_options
from qat.ops.soft import planes, reference
from qat.quantizers import soft


def soft_quantize(
    w: Tensor, beta: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype, *options: Any
) -> tuple[Tensor, Tensor]:
    """See `reference.soft_quantize`."""
    if w.numel() == 0 or dtype not in DTYPES or not cpu.compiled():
        return reference.soft_quantize(w, beta, parameters, dtype, *options)
    found = soft.levels_of(w, parameters, WeightOptions(*options), cpu.SCALES)
    values, slope = torch.ops.qat.cpu_soften(*[one.contiguous() for one in found], beta.item(), DTYPES.index(dtype))
    return values.view(w.shape), slope.view(w.shape)


def rounded(x: Tensor, granularity: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.rounded`."""
    k = x.shape[-1]
    if granularity != "token" or x.dtype not in DTYPES or x.numel() == 0 or k > MAX_WIDTH or not cpu.compiled():
        codes, scale = torch.ops.qat.quantize_activation(x, granularity, eps)
        return torch.ops.qat.dequantize(codes, scale, x.dtype), codes, scale
    values, codes, scale = torch.ops.qat.cpu_rounded(x.reshape(-1, k).contiguous(), eps)
    return values.view(x.shape), codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def soft_bitlinear(
    x: Tensor, w: Tensor, bias: Tensor | None, beta: Tensor, parameters: Sequence[Tensor], *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.soft_bitlinear`."""
    o = TrainingOptions(*options)
    if o.act_bits is None or not planes.serves(x, w):
        return reference.soft_bitlinear(x, w, bias, beta, parameters, *options, soften=soft_quantize, activation=rounded)
    weight, slope = soft_quantize(w, beta, parameters, x.dtype, *weight_options(o))
    codes, scale = cpu.quantize_activation(x, o.act_granularity, o.eps)
    return planes.linear(codes, scale, weight, bias), codes, scale, weight, slope
