"""Ternary codes sign(w) where |w| reaches a threshold, and the scale of least squares for such codes: the mean of the kept |w|.

    twn      kept above 0.7 mean|w|, near the least-squares optimum of normal and uniform weights. TWN, arXiv:1605.04711, eq. 5-6
    count    the largest 86 of 128 kept, whatever the distribution: zeros are then a fixed 33 %
    learned  kept from theta mean|w| on, with theta a parameter. TTQ, arXiv:1612.01064, sets such a threshold by hand

The gradient of theta: where |w| passes the threshold D a weight falls from s to 0. Spread evenly over a width s around it, as the
straight-through estimate spreads the step of a rounding, that is dQ/dD = -sign(w) for ||w| - D| < s / 2, and 0 elsewhere. It is a
sum over L weights and divided by sqrt(L), as LSQ does it (arXiv:1902.08153, section 2.2), so that clipping by the norm of all
gradients does not see it alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.quantizers.record import WeightOptions
from qat.quantizers.scales import mean

_TWN = 0.7
_KEPT = 86 / 128


def kept_mean(magnitudes: Tensor, kept: Tensor) -> Tensor:
    """The mean [R, 1] of the kept magnitudes of rows [R, L], summed in float64; 0 where none is kept."""
    total = (magnitudes * kept).sum(-1, keepdim=True, dtype=torch.float64)
    return (total / kept.sum(-1, keepdim=True).clamp_min(1)).float()


def levels(scale: Tensor, border: Tensor) -> tuple[Tensor, Tensor]:
    """Levels -s, 0, s and borders -D, D for scales and thresholds [R, 1]."""
    return torch.cat([-scale, torch.zeros_like(scale), scale], 1), torch.cat([-border, border], 1)


def _twn_border(rows: Tensor) -> Tensor:
    return _TWN * mean(rows.abs())


def _twn_kept(rows: Tensor) -> Tensor:
    return rows.abs() > _twn_border(rows)


def twn_soft(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Levels [R, 3] and borders [R, 2]."""
    return levels(scale, _twn_border(rows))


def twn_scale(rows: Tensor, options: WeightOptions) -> Tensor:
    """[R, 1] of rows [R, L]."""
    return kept_mean(rows.abs(), _twn_kept(rows))


def twn_codes(rows: Tensor, scale: Tensor) -> Tensor:
    """{-1, 0, 1} of rows [R, L]."""
    return rows.sign() * _twn_kept(rows)


def _count_border(rows: Tensor) -> Tensor:
    """The smallest magnitude that is kept."""
    length = rows.shape[-1]
    zeros = length - max(1, round(length * _KEPT))
    return rows.abs().kthvalue(zeros + 1, -1, keepdim=True).values


def _count_kept(rows: Tensor) -> Tensor:
    """Weights as large as the smallest one kept are kept too, so that rows of one magnitude are no zeros."""
    return rows.abs() >= _count_border(rows)


def count_soft(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Levels [R, 3] and borders [R, 2]."""
    return levels(scale, _count_border(rows))


def count_scale(rows: Tensor, options: WeightOptions) -> Tensor:
    """[R, 1] of rows [R, L]."""
    return kept_mean(rows.abs(), _count_kept(rows))


def count_codes(rows: Tensor, scale: Tensor) -> Tensor:
    """{-1, 0, 1} of rows [R, L]."""
    return rows.sign() * _count_kept(rows)


def _border(magnitudes: Tensor, threshold: Tensor) -> Tensor:
    """theta mean|w|, and never above the largest, so that something is kept."""
    return torch.minimum(threshold.abs() * mean(magnitudes), magnitudes.amax(-1, keepdim=True))


def learned_start(rows: Tensor, options: WeightOptions) -> Tensor:
    """Theta starts as TWN's."""
    return rows.new_full((rows.shape[0], 1), _TWN)


def learned_scale(rows: Tensor, options: WeightOptions, threshold: Tensor) -> Tensor:
    """[R, 1] of rows [R, L] for theta [R, 1]."""
    magnitudes = rows.abs()
    return kept_mean(magnitudes, magnitudes >= _border(magnitudes, threshold))


def learned_codes(rows: Tensor, scale: Tensor, threshold: Tensor) -> Tensor:
    """{-1, 0, 1} of rows [R, L] for theta [R, 1]."""
    magnitudes = rows.abs()
    return rows.sign() * (magnitudes >= _border(magnitudes, threshold))


def learned_soft(rows: Tensor, scale: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Levels [R, 3] and borders [R, 2]: theta's gradient is by way of these."""
    return levels(scale, _border(rows.abs(), threshold))


def learned_gradient(
    grad: Tensor, rows: Tensor, codes: Tensor, scale: Tensor, threshold: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Straight-through for the weights [R, L]; theta's [R, 1] as the module's docstring has it."""
    magnitudes = rows.abs()
    near = (magnitudes - _border(magnitudes, threshold)).abs() < scale / 2
    of_border = -(grad * rows.sign() * near).sum(-1, keepdim=True)
    return grad, {"threshold": of_border * mean(magnitudes) * threshold.sign() / rows.shape[-1] ** 0.5}
