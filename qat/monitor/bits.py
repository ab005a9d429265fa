"""Codes as packed bits: two bits a code, whether it is 0 and its sign, in words of 64, compared by xor and counted by words.

A code's change costs two bits of memory traffic instead of two bytes, and all layers are compared in a handful of calls. Each
layer begins a word.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

WORD = 64
Bits = tuple[Tensor, Tensor]
"""Of codes: not 0, and above 0; int64 [W] each."""
_LOWEST = 0x0101010101010101
"""The lowest bit of each byte."""
SPAN = 1 << 14
_SPREAD = 0x0102040810204080
"""Eight bytes of 0 or 1 in one int64 times this have them side by side in the highest byte."""


def packed(codes: Tensor) -> Bits:
    """Of codes -1, 0, 1, int8 of any shape: which are not 0, and which are above 0, int64 [W], the last word filled with 0.

    The bytes of -1 and 1 have their lowest bit set and that of -1 its highest, so eight codes are taken from an int64 at once.
    """
    flat = codes.reshape(-1)
    eight = functional.pad(flat, (0, -len(flat) % WORD)).view(torch.int64)
    kept = eight & _LOWEST
    return _bits(kept), _bits(kept & ~(eight >> 7))


def _bits(flags: Tensor) -> Tensor:
    """Bytes of 0 or 1, int64 [8 W], to bits, int64 [W]. The shift keeps the sign, and one byte is left of it."""
    return ((flags * _SPREAD) >> 56).to(torch.uint8).view(torch.int64)


def joined(bits: Sequence[Bits]) -> Bits:
    """Those of all layers, one after another."""
    kept, above = zip(*bits, strict=True)
    return torch.cat(kept), torch.cat(above)


def spans(words: Tensor) -> list[slice]:
    """What is looked at together of int64 [W]: a CPU keeps SPAN words in its cache, and what is computed of them."""
    step = max(len(words) if words.is_cuda else SPAN, 1)
    return [slice(start, start + step) for start in range(0, max(len(words), 1), step)]


def ones(bits: Tensor) -> Tensor:
    """How many bits are set in each word of int64 [W], uint8 [W]."""
    found = bits - ((bits >> 1) & 0x5555555555555555)
    found = (found & 0x3333333333333333) + ((found >> 2) & 0x3333333333333333)
    found = (found + (found >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((found * _LOWEST) >> 56).to(torch.uint8)


def totals(counts: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums of uint8 [W], int64 [L], over each of the L runs that lie one after another."""
    ends = torch.tensor([0, *lengths], device=counts.device).cumsum(0)
    return functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))[ends].diff()
