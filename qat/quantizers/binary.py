"""Binary codes of BitNet, arXiv:2310.11453, eq. 1-3: t = +1 if w > mean(W) else -1, with s = max(mean|W|, eps), uncentred."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.quantizers.scales import mean


def threshold(rows: Tensor) -> Tensor:
    """The mean [R, 1], above which a weight is +1."""
    return mean(rows)


def codes(rows: Tensor, scale: Tensor, **_: Tensor) -> Tensor:
    """{-1, 1} of rows [R, L]; the scale does not matter."""
    return torch.where(rows > threshold(rows), 1.0, -1.0)


def part(weights: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """`codes` of some weights [n, K] of one row, with the whole row's mean [1, 1]."""
    return torch.where(weights > mean, 1.0, -1.0)


def soft(rows: Tensor, scale: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
    """Levels -s, s and the border mean(W) for scales [R, 1]."""
    return torch.cat([-scale, scale], 1), threshold(rows)
