"""Codes as they are kept from the forward pass to the backward: 2 bits each where they are -1, 0 and 1, else int8.

The record's levels decide. Several planes lie side by side, so a weight of k components takes 2 k bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.ops.operands import LEVELS
from qat.quantizers.record import Quantizer


def in_bits(record: Quantizer) -> bool:
    """Whether 2 bits hold a code of this quantizer."""
    return LEVELS.issuperset(record.levels)


def keep(t: Tensor, record: Quantizer, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """Codes int8 t [N, planes * K] as they are kept: uint8 [N, ceil(planes * K / 4)], or as they are."""
    return pack(t) if in_bits(record) else t


@dataclass(frozen=True)
class Kept:
    """Codes [N, k] that were kept."""

    codes: Tensor
    k: int

    def values(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """codes * scale [N, k] in float32, rounded to `dtype`, for scale [1 | N, G]."""
        if self.codes.dtype == torch.int8:
            return torch.ops.qat.dequantize(self.codes, scale, dtype)
        return torch.ops.qat.dequantize_bits(self.codes, self.k, scale, dtype)

    def alone(self, dtype: torch.dtype) -> Tensor:
        """The codes [N, k] themselves in `dtype`, which holds them."""
        if self.codes.dtype == torch.int8:
            return self.codes.to(dtype)
        if dtype == torch.int8:
            return torch.ops.qat.unpack_bits(self.codes, self.k)
        return torch.ops.qat.dequantize_bits(self.codes, self.k, self.codes.new_ones(1, 1, dtype=torch.float32), dtype)
