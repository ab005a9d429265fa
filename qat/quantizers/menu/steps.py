"""Learned steps: codes round(w / s) on a grid of whole numbers whose step s is a parameter. LSQ, arXiv:1902.08153.

    Q(w) = s clip(round(w / s), low, high)
    dQ/dw = 1 within low <= w / s <= high, else 0                                                   (eq. 5 and its clip)
    dQ/ds = round(w / s) - w / s within, low or high outside, times 1 / sqrt(L high)                (eq. 3 and section 2.2)

The parameter is the step in units of its start: 2 mean|w| / sqrt(high) for uniform codes, as in the paper, and mean|w| for
ternary ones, where the paper's would make 57 % zeros. For SGD a unit is but another learning rate; Adam's updates know no
magnitude, and at a weight's rate would move a step of .05 by .002 at once: in units of its start it moves by .2 %.

Codes of more than three levels are balanced ternary digits, c = 3 a + b, which every ternary kernel and layout holds as a sum of
planes whose scales have the ratio 3: 2 and 3 bits in two planes, 4 bits in three. Stored, they take the bytes of their planes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.quantizers.record import WeightOptions
from qat.quantizers.scales import mean


def digits(codes: Tensor, planes: int) -> Tensor:
    """Balanced ternary digits [planes, ...] of whole numbers, the highest first."""
    found = []
    for _ in range(planes):
        rest = (codes / 3).round()
        found.append(codes - 3 * rest)
        codes = rest
    return torch.stack(found[::-1])


def whole(planes: Tensor, ratios: tuple[float, ...]) -> Tensor:
    """The sum [R, L] of planes [planes, R, L] times their ratios; of a single plane [R, L], itself."""
    if planes.ndim == 2:
        return planes
    return sum((ratio * plane for ratio, plane in zip(ratios, planes, strict=True)), torch.zeros_like(planes[0]))


def start(rows: Tensor, options: WeightOptions) -> Tensor:
    """The step in units of its start [R, 1]: 1."""
    return rows.new_ones(rows.shape[0], 1)


@dataclass(frozen=True)
class Grid:
    """The whole numbers from `low` to `high`, in that many planes of digits."""

    low: int
    high: int
    planes: int

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of the planes' scales."""
        return tuple(3.0**i for i in reversed(range(self.planes)))

    def unit(self, rows: Tensor, options: WeightOptions) -> Tensor:
        """What the step starts as [R, 1], above 0."""
        times = 1.0 if self.planes == 1 else 2 / self.high**0.5
        return (times * mean(rows.abs())).clamp_min(options.eps)

    def scale(self, rows: Tensor, options: WeightOptions, step: Tensor, unit: Tensor) -> Tensor:
        """The step [R, 1]."""
        return step.abs() * unit

    def codes(self, rows: Tensor, scale: Tensor, **_: Tensor) -> Tensor:
        """[planes, R, L] of rows [R, L] and scales [R, planes], the step last; half to even."""
        return digits((rows / scale[:, -1:]).round().clamp(self.low, self.high), self.planes)

    def soft(self, rows: Tensor, scale: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
        """Levels [R, m] and the borders half way between them, for scales [R, planes]."""
        numbers = torch.arange(self.low, self.high + 1, dtype=scale.dtype, device=scale.device)
        return numbers * scale[:, -1:], (numbers[1:] - 0.5) * scale[:, -1:]

    def gradient(
        self, grad: Tensor, rows: Tensor, codes: Tensor, scale: Tensor, step: Tensor, unit: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the rows [R, L] and of the step [R, 1], as the module's docstring has them."""
        exact, found = rows / scale[:, -1:], whole(codes, self.ratios)
        inside = (exact >= self.low) & (exact <= self.high)
        of_step = (grad * torch.where(inside, found - exact, found)).sum(-1, keepdim=True)
        return grad * inside, {"step": of_step * unit * step.sign() / (rows.shape[-1] * self.high) ** 0.5}


TERNARY = Grid(-1, 1, 1)
TWO, THREE, FOUR = Grid(-2, 1, 2), Grid(-4, 3, 2), Grid(-8, 7, 3)
