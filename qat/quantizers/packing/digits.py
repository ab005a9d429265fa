"""Layouts whose bytes are a few digits t + 1 in base 4 or 3, the first weight's the lowest; any codes in {-1, 0, 1} fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """So many digits of that base a byte."""

    per_byte: int
    base: int

    def powers(self, device: torch.device) -> Tensor:
        """base^i for i below per_byte, int32."""
        return torch.tensor([self.base**i for i in range(self.per_byte)], dtype=torch.int32, device=device)

    def pack(self, codes: Tensor) -> Tensor:
        """Padding is the zero weight's digit 1."""
        digits = torch.nn.functional.pad(codes, (0, -codes.shape[1] % self.per_byte)) + 1
        return (digits.unflatten(1, (-1, self.per_byte)) * self.powers(codes.device)).sum(-1).to(torch.uint8)

    def decode(self, packed: Tensor, k: int) -> Tensor:
        """No look at the values, so no wait for a GPU."""
        digits = packed.to(torch.int32)[..., None] // self.powers(packed.device) % self.base
        return (digits - 1).to(torch.int8).flatten(1)[:, :k].contiguous()

    def invalid(self, packed: Tensor, k: int) -> Tensor:
        """A digit of 3, or a number above all digits of 2."""
        if self.base == 4:
            return (packed & (packed >> 1) & 0x55) != 0
        return packed >= self.base**self.per_byte

    def misfits(self, codes: Tensor) -> Tensor:
        """None."""
        return torch.zeros_like(codes, dtype=torch.bool)


TWO_BIT, BASE3 = Digits(4, 4), Digits(5, 3)
