"""Tequila's dead-zone bias, arXiv:2509.23809: weights whose code is 0 add to the layer's output, whatever its input is.

    y = x Q(W)^T + lambda sum over the zeros of W          lambda = 0.001

So a weight that is stuck between the thresholds has a gradient of its own, lambda times its output's, beside the straight-through
one. The sum does not depend on the input: packed, it is a bias, folded into the layer's own, and a layer without one gets one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_REACTIVATION = 1e-3
"""The paper's lambda."""


def bias(weight: Tensor, codes: Tensor) -> Tensor:
    """What the zeros among codes [N, K] of a weight [N, K] add to the outputs, float32 [N]; summed in float64."""
    return _REACTIVATION * (weight.float() * (codes == 0)).sum(-1, dtype=torch.float64).float()
