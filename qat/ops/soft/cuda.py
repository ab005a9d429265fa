"""The soft ops on CUDA: Q and its slope by a compiled kernel, which reads beta where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat.ops import cuda
from qat.ops.operands import DTYPES
from qat.ops.options import WeightOptions
from qat.ops.soft import reference
from qat.quantizers import soft


def soft_quantize(
    w: Tensor, beta: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype, *options: Any
) -> tuple[Tensor, Tensor]:
    """See `reference.soft_quantize`."""
    if w.numel() == 0 or dtype not in DTYPES or not cuda._serves(w):
        return reference.soft_quantize(w, beta, parameters, dtype, *options)
    found = soft.levels_of(w, parameters, WeightOptions(*options), cuda.SCALES)
    values, slope = torch.ops.qat.cuda_soften(*[one.contiguous() for one in found], beta.float(), DTYPES.index(dtype))
    return values.view(w.shape), slope.view(w.shape)


def rounded(x: Tensor, granularity: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.rounded`."""
    codes, scale = torch.ops.qat.quantize_activation(x, granularity, eps)
    return torch.ops.qat.dequantize(codes, scale, x.dtype), codes, scale
