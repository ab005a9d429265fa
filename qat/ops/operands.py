"""What the compiled kernels of every device take."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.quantizers import components
from qat.quantizers.menu import sparse, steps, stretched, thresholds
from qat.quantizers.record import Quantizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of x, in the order of the kernels' enums."""
MAX_WIDTH = 2**18
"""Most codes a row, in_features times planes: sums stay far from the ends of int32."""
ELSEWHERE = f"float activations and in_features > {MAX_WIDTH} run in pure torch"
"""For people: what is left to the reference."""

LEVELS = frozenset({-1, 0, 1})
"""The codes that the matmuls multiply by."""
FITTED = frozenset(
    {
        components.codes,
        sparse.codes,
        steps.TWO.codes,
        steps.THREE.codes,
        steps.FOUR.codes,
        stretched.FOUR.codes,
        thresholds.twn_codes,
        thresholds.count_codes,
        thresholds.learned_codes,
    }
)
"""Codes that torch takes on every device; the matmuls that follow are compiled."""


def multiplies(record: Quantizer) -> bool:
    """Whether the matmuls can take this quantizer's codes."""
    return LEVELS.issuperset(record.levels)


def narrow(x: Tensor) -> Tensor:
    """float64 is quantized from float32, as the reference does."""
    return x if x.dtype in DTYPES else x.float()


def float_bias(bias: Tensor | None) -> Tensor | None:
    """The bias as it is added."""
    return None if bias is None else bias.float().contiguous()
