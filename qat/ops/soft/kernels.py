"""The soft ops by device: the layer is put together of ops that have kernels there, or else are torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from qat.ops.soft import cpu, cuda, reference

CPU: dict[str, Callable[..., Any]] = {
    "soft_quantize": cpu.soft_quantize,
    "soft_bitlinear": cpu.soft_bitlinear,
}
CUDA: dict[str, Callable[..., Any]] = {
    "soft_quantize": cuda.soft_quantize,
    "soft_bitlinear": partial(reference.soft_bitlinear, soften=cuda.soft_quantize, activation=cuda.rounded),
}
