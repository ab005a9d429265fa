"""3:4 sparse ternary codes: of four consecutive weights the smallest is 0, the others are their signs. Sherry, arXiv:2601.07892.

Four places of the zero times eight signs are 32 states: 5 bits, 1.25 a weight. The scale is the least squares', the mean of the
kept |w|. Sherry's annealed full-precision path beside the codes (Arenas) is not here; `optim.lambda_steps` blends in another way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.quantizers.menu.thresholds import kept_mean
from qat.quantizers.record import WeightOptions

_BLOCK = 4


def _kept(rows: Tensor) -> Tensor:
    """All but the smallest of each four, the first of equal ones."""
    blocks = rows.abs().unflatten(-1, (-1, _BLOCK))
    return torch.ones_like(blocks, dtype=torch.bool).scatter(-1, blocks.argmin(-1, keepdim=True), False).reshape(rows.shape)


def scale(rows: Tensor, options: WeightOptions) -> Tensor:
    """[R, 1] of rows [R, L], L a multiple of 4."""
    return kept_mean(rows.abs(), _kept(rows))


def codes(rows: Tensor, scale: Tensor) -> Tensor:
    """{-1, 0, 1} of rows [R, L], exactly one 0 in four."""
    return torch.where(rows < 0, -1.0, 1.0) * _kept(rows)
