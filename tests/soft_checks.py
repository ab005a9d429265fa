"""Soft codes by their formula in float64, and problems for the kernels that compute them."""

from __future__ import annotations

import torch
from torch import Tensor

BETAS = [0.5, 2.0, 17.0, 60.0, 80.0, 81.0, 200.0, 1e5]
ROWS = [(1, 1), (3, 15), (2, 16), (5, 37), (2, 1024), (3, 2500), (60, 32)]


def levels_of(kind: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Levels [R, m] and borders [R, m - 1] as the quantizers have them."""
    s = rows.abs().mean(1, keepdim=True)
    if kind == "binary":
        return torch.cat([-s, s], 1), rows.mean(1, keepdim=True)
    if kind == "ternary":
        return torch.cat([-s, 0 * s, s], 1), torch.cat([-s / 2, s / 2], 1)
    steps = torch.tensor([-1.0, 0.0, 1.0])
    second = 0.37 if kind == "two components" else 0.0  # 0: three times three levels that are equal
    levels = (s * (steps[:, None] + second * steps).flatten()).sort(1).values
    return levels, ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()


def exact(rows: Tensor, levels: Tensor, borders: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """levels[0] + the steps of logistic thresholds, in float64, and its derivative."""
    rows, levels, borders = rows.double(), levels.double(), borders.double()
    soft, slope = levels[:, :1].expand(rows.shape).clone(), torch.zeros_like(rows)
    for i in range(borders.shape[1]):
        apart = levels[:, i + 1 : i + 2] - levels[:, i : i + 1]
        z = torch.where(apart > 0, beta * (rows - borders[:, i : i + 1]) / apart.clamp_min(1e-300), 0.0)
        soft += apart * z.sigmoid()
        slope += (apart > 0) * beta * z.sigmoid() * (-z).sigmoid()
    return soft, slope


def weights(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    w = torch.randn(shape, generator=generator) / 30
    w[0, 0] = 3.0  # far from every border
    return w


def check_soft(found: tuple[Tensor, Tensor], rows: Tensor, levels: Tensor, borders: Tensor, beta: float) -> None:
    """Within 4e-7 of the scale, and a slope within 5e-7 of beta: what float32 leaves of a sum of two to eight borders."""
    wanted, wanted_slope = exact(rows, levels, borders, beta)
    soft, slope = found
    assert ((soft - wanted).abs() / levels[:, -1:].abs()).max() < 4e-7
    assert (slope - wanted_slope).abs().max() < 5e-7 * beta
    assert (slope >= 0).all()
