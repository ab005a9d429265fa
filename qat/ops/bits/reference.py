"""The bits of codes in pure torch, in the layout `2bit` of `qat.quantizers.packing`.

Unlike packing for files, nothing here looks at the values: codes come from a quantizer, and a GPU need not be waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.ops import reference
from qat.quantizers import packing

LAYOUT = "2bit"


def pack_bits(t: Tensor) -> Tensor:
    """uint8 [N, ceil(K / 4)] of codes int8 t [N, K] in {-1, 0, 1}."""
    return packing.encode(t)


def unpack_bits(bits: Tensor, k: int) -> Tensor:
    """Codes int8 [N, k]; the inverse of `pack_bits`."""
    return packing.decode(bits, k, LAYOUT)


def dequantize_bits(bits: Tensor, k: int, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale [N, k] in `dtype`, as `reference.dequantize` gives them, for scale [1 | N, G]."""
    return reference.dequantize(torch.ops.qat.unpack_bits(bits, k), scale, dtype)
