"""Codes as packed bits: two bits a code, whether it is 0 and its sign, in words of 64, compared by xor and counted by words.

A code's change costs two bits of memory traffic instead of two bytes, and all layers are compared in a handful of calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 64
_SPREAD = 0x0102040810204080
"""Eight bytes of 0 or 1 in one int64 times this have them side by side in the highest byte."""


def packed(codes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of codes int8 of any shapes: which are not 0, and which are above 0, int64 [W]; each tensor begins a word."""
    sizes = [words(one.numel()) * WORD for one in codes]
    flat = torch.zeros(sum(sizes), dtype=torch.int8, device=codes[0].device)
    for part, one in zip(flat.split(sizes), codes, strict=True):
        part[: one.numel()] = one.reshape(-1)
    return _bits(flat != 0), _bits(flat > 0)


def words(count: int) -> int:
    """Words that hold that many bits."""
    return -(-count // WORD)


def _bits(flags: Tensor) -> Tensor:
    """bool [64 W] -> int64 [W]. The shift keeps the sign, and one byte is left of it."""
    return ((flags.view(torch.int64) * _SPREAD) >> 56).to(torch.uint8).view(torch.int64)


def counts(bits: Tensor, lengths: Sequence[int]) -> Tensor:
    """How many bits are set, int64 [L], in each of the L runs of words that lie one after another in int64 [W]."""
    ones = bits - ((bits >> 1) & 0x5555555555555555)
    ones = (ones & 0x3333333333333333) + ((ones >> 2) & 0x3333333333333333)
    ones = (ones + (ones >> 4)) & 0x0F0F0F0F0F0F0F0F
    ones = (ones * 0x0101010101010101) >> 56
    ends = torch.tensor(lengths, device=bits.device).cumsum(0) - 1
    return ones.cumsum(0)[ends].diff(prepend=ones.new_zeros(1))
