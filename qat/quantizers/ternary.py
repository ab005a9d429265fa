"""Ternary codes of BitNet b1.58, arXiv:2402.17764, eq. 1-3: t = clip(round(w / s), -1, 1), with s = max(f|W|, eps)."""

from __future__ import annotations

import torch
from torch import Tensor


def codes(rows: Tensor, scale: Tensor, **_: Tensor) -> Tensor:
    """{-1, 0, 1} of rows [R, L] with their scale [R, 1]; half to even."""
    return (rows / scale).round().clamp(-1, 1)


def part(weights: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """`codes` of some weights [n, K] of one row."""
    return codes(weights, scale)


def soft(rows: Tensor, scale: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
    """Levels -s, 0, s and borders -s / 2, s / 2 for scales [R, 1]."""
    return torch.cat([-scale, torch.zeros_like(scale), scale], 1), torch.cat([-scale, scale], 1) / 2
