"""Other gradients than the identity for b1.58's codes t = clip(round(w / s), -1, 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.quantizers.record import WeightOptions

_CLIP = 1.5
"""|w / s| from which the clip acts: further out no change of a weight changes its code's rounding."""


def clipped(grad: Tensor, rows: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Straight-through where the clip does not act, 0 beyond it: the saturating estimate of BNN, arXiv:1602.02830, eq. 4."""
    return grad * ((rows / scale).abs() <= _CLIP), {}


def straight(rows: Tensor, options: WeightOptions) -> Tensor:
    """The sharpness of the identity: 0."""
    return rows.new_zeros(())


def sharpened(grad: Tensor, rows: Tensor, codes: Tensor, scale: Tensor, sharpness: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes are hard from the start, and the gradient that of soft ones (`qat.quantizers.soft`), of a sharpness that rises.

        dQ/dw = beta / 4 [sech^2(beta (w / s - 1/2) / 2) + sech^2(beta (w / s + 1/2) / 2)]

    So less and less of it reaches weights far from a border: the estimates of DSQ, arXiv:1908.05033, and of IR-Net's EDE,
    arXiv:1909.10788, eq. 9, with two borders. Sharpness 0 stands for straight-through.
    """
    slope = sum((1 - torch.tanh((rows / scale + border) * sharpness / 2) ** 2 for border in (-0.5, 0.5)), torch.zeros_like(rows))
    return grad * torch.where(sharpness > 0, slope * sharpness / 4, 1.0), {}
