"""The soft ops by device: the layer is put together of ops that have kernels there, or else are torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qat.ops.soft import cpu, reference


def rounded(x: Tensor, granularity: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.rounded`."""
    codes, scale = torch.ops.qat.quantize_activation(x, granularity, eps)
    return torch.ops.qat.dequantize(codes, scale, x.dtype), codes, scale


def _soft_quantize(*arguments: Any) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.qat.soft_quantize(*arguments)
    return found


CPU: dict[str, Callable[..., Any]] = {
    "soft_quantize": cpu.soft_quantize,
    "soft_bitlinear": partial(reference.soft_bitlinear, soften=cpu.soft_quantize, activation=cpu.rounded),
}
CUDA: dict[str, Callable[..., Any]] = {
    "soft_bitlinear": partial(reference.soft_bitlinear, soften=_soft_quantize, activation=rounded),
}
