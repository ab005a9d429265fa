"""What a layer's inputs say of its weight: sums over the tokens of a text, from which the best weight and its codes follow.

X_q are the layer's inputs in the quantized model, as the packed layer sees them: normed, if it norms them, and rounded to int8.
Y is what it should give there: what the layer in full precision gives in its own model, X_f W_0^T, and for one that writes into
the residual stream also what that stream lacks, h_f - h_q.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qat import ops
from qat.calibration.recorder import Call
from qat.nn.bitlinear import BitLinear


class Moments:
    """Of one layer; float64."""

    def __init__(self, layer: BitLinear) -> None:
        n, k = layer.weight.shape
        self.layer, self.weight = layer, layer.weight.detach().float()
        self.second = torch.zeros(k, k, dtype=torch.float64, device=self.weight.device)
        """X_q^T X_q."""
        self.cross = torch.zeros(n, k, dtype=torch.float64, device=self.weight.device)
        """Y^T X_q."""
        self.power = 0.0
        """|Y|^2."""
        self.tokens = 0
        self.alone = False
        """Whether some of its tokens could not be paired with those of the full-precision model."""

    def add(self, full: Sequence[Call], quantized: Sequence[Call], tokens: int) -> None:
        """The layer's calls in both models for a window of so many tokens.

        A layer that sees but a part of them (an expert) may see others in each model. It is then taken by itself: X_f = X_q.
        """
        paired = len(full) == len(quantized) and all(_rows(call.input) == tokens for call in (*full, *quantized))
        self.alone = self.alone or not paired
        for theirs, mine in zip(full if paired else quantized, quantized, strict=True):
            x = theirs.input.flatten(0, -2).float()
            wanted = x @ self.weight.T
            if theirs.stream is not None and mine.stream is not None:
                wanted += (theirs.stream.float() - mine.stream.float()).reshape(wanted.shape)
            self._sum(self._seen(mine.input), wanted.double())

    def _seen(self, x: Tensor) -> Tensor:
        """The inputs as the packed layer multiplies them, float64 [T, K]."""
        config = self.layer.config
        if self.layer.rms_norm is not None:
            x = self.layer.rms_norm(x)
        if config.act_bits is not None:
            codes, scale = ops.quantize_activation(x, config.act_granularity, config.eps, config.kernels)
            x = codes.double() * scale
        return x.flatten(0, -2).double()

    def _sum(self, x: Tensor, wanted: Tensor) -> None:
        self.second += x.T @ x
        self.cross += wanted.T @ x
        self.power += float(wanted.square().sum())
        self.tokens += len(x)

    def error(self, weight: Tensor) -> float:
        """|X_q W^T - Y|^2 / |Y|^2 of a weight [N, K]."""
        square = ((weight @ self.second) * weight).sum() - 2 * (weight * self.cross).sum()
        return (float(square) + self.power) / self.power if self.power else 0.0


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]
