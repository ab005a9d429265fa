"""The layout of codes with exactly one zero in four neighbours: 5 bits a block, 1.25 a weight (Sherry, arXiv:2601.07892).

A block's number is 8 p + s: p is the zero's place, and bit i of s says that the i-th of the other three is 1, not -1. The numbers
follow one another in a row's bytes, least significant bits first; what is left of the last byte is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK, BITS = 4, 5


def _powers(count: int, device: torch.device) -> Tensor:
    """[count]: 2^i."""
    return 2 ** torch.arange(count, dtype=torch.int32, device=device)


def _others(device: torch.device) -> Tensor:
    """[4, 3]: where the other three are, by the zero's place."""
    return torch.tensor([[i for i in range(BLOCK) if i != p] for p in range(BLOCK)], device=device)


def _bits(values: Tensor, count: int) -> Tensor:
    """The lowest bits of [N, m], int32 [N, count * m]."""
    return (values.to(torch.int32)[..., None] // _powers(count, values.device) % 2).flatten(1)


def _numbers(bits: Tensor, count: int) -> Tensor:
    """The inverse of `_bits`."""
    return (bits.unflatten(1, (-1, count)) * _powers(count, bits.device)).sum(-1)


def pack(codes: Tensor) -> Tensor:
    """K is a multiple of 4."""
    blocks = codes.to(torch.int32).unflatten(1, (-1, BLOCK))
    zero = (blocks == 0).to(torch.int32).argmax(-1)
    signs = (blocks.gather(-1, _others(codes.device)[zero]) > 0).to(torch.int32)
    bits = _bits(8 * zero + _numbers(signs.flatten(1), BLOCK - 1), BITS)
    return _numbers(torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)), 8).to(torch.uint8)


def decode(packed: Tensor, k: int) -> Tensor:
    """No look at the values, so no wait for a GPU."""
    numbers = _numbers(_bits(packed, 8)[:, : k // BLOCK * BITS], BITS)
    signs = 2 * _bits(numbers, BLOCK - 1).unflatten(1, (-1, BLOCK - 1)) - 1
    blocks = torch.zeros(*numbers.shape, BLOCK, dtype=torch.int32, device=packed.device)
    return blocks.scatter(-1, _others(packed.device)[numbers // 8], signs).to(torch.int8).flatten(1)


def invalid(packed: Tensor, k: int) -> Tensor:
    """All 32 numbers are blocks; only the last byte's padding can be wrong."""
    used = k // BLOCK * BITS % 8
    bad = torch.zeros_like(packed, dtype=torch.bool)
    if used and packed.shape[1]:
        bad[:, -1] = packed[:, -1] >> used != 0
    return bad


def misfits(codes: Tensor) -> Tensor:
    """Blocks that have no zero or several; all codes where they do not fill blocks."""
    if codes.shape[1] % BLOCK:
        return torch.ones_like(codes, dtype=torch.bool)
    return ((codes.unflatten(1, (-1, BLOCK)) == 0).sum(-1) != 1).repeat_interleave(BLOCK, 1)
