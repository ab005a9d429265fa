"""Other gradients than the identity for b1.58's codes t = clip(round(w / s), -1, 1)."""

from __future__ import annotations

from torch import Tensor

_CLIP = 1.5
"""|w / s| from which the clip acts: further out no change of a weight changes its code's rounding."""


def clipped(grad: Tensor, rows: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Straight-through where the clip does not act, 0 beyond it: the saturating estimate of BNN, arXiv:1602.02830, eq. 4."""
    return grad * ((rows / scale).abs() <= _CLIP), {}
