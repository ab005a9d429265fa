"""Which values a weight may take: sums of scales times digits, as a layer [N, K] of codes and scales holds them.

A digit is one combination of codes, one code a plane (`quant.components`); with s [P] the scales of its row and group, the
value of digit d is <s, d>. Scales are float64 [..., R, G, P] here, R = 1 where all rows share them, G groups along the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from qat import ops
from qat.config import QuantConfig
from qat.quantizers.scales import round_scale


@dataclass(frozen=True)
class Lattice:
    """The digits, and how scales are shared and stored."""

    digits: Tensor
    """float64 [L, P]."""
    groups: int
    """G along the input."""
    tied: bool
    """Whether all rows share a scale."""
    least: float
    """Lower bound of a scale."""
    dtype: str
    """That scales are stored in."""

    @classmethod
    def of(cls, config: QuantConfig, in_features: int, device: torch.device | None = None) -> Lattice:
        """What a layer of that configuration and width can hold."""
        digits = list(product(config.quantizer.levels, repeat=config.components))
        table = torch.tensor(digits, dtype=torch.float64, device=device)
        groups = in_features // (config.group_size or in_features)
        return cls(table, groups, config.granularity == "tensor", config.eps, config.scale_dtype)

    def values(self, scale: Tensor) -> Tensor:
        """Of each digit, [..., R, G, L], for scales [..., R, G, P]."""
        return scale @ self.digits.T

    def weight(self, index: Tensor, scale: Tensor) -> Tensor:
        """[..., N, K] of the digits' indices [..., N, K]."""
        grouped, values = index.unflatten(-1, (self.groups, -1)), self.values(scale)
        return values.expand(*grouped.shape[:-1], -1).gather(-1, grouped).flatten(-2)

    def rounded(self, scale: Tensor) -> Tensor:
        """The scales as they are stored."""
        return round_scale(scale.float().clamp_min(self.least), self.dtype).double()

    def codes(self, index: Tensor) -> Tensor:
        """int8 [N, P * K], planes side by side, of indices [N, K]."""
        return self.digits.T[:, index].to(torch.int8).transpose(0, 1).flatten(1).contiguous()

    def stored(self, scale: Tensor) -> Tensor:
        """float32 [1 | N, P * G], as layers hold it, of scales [R, G, P]."""
        return scale.transpose(-1, -2).flatten(-2).float().contiguous()

    def start(self, weight: Tensor, config: QuantConfig) -> Tensor:
        """The scales [R, G, P] to begin with for a weight [N, K]: the quantizer's own; of one plane, as fits its codes."""
        codes, stored = ops.quantize_weight(weight.float(), config)
        scale = stored.double().unflatten(-1, (self.digits.shape[1], self.groups)).transpose(-1, -2)
        if self.digits.shape[1] > 1:
            return scale
        rows, codes = (one.double().unflatten(-1, (self.groups, -1)) for one in (weight, codes))
        push, count = (rows * codes).sum(-1), codes.square().sum(-1)
        if self.tied:
            push, count = push.sum(0, keepdim=True), count.sum(0, keepdim=True)
        fitted = push / count.clamp_min(1)
        return torch.where(fitted > 0, fitted, scale[..., 0])[..., None]


def nearest(target: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Index int64 and value [..., N] of the value [..., N | 1, L] that is nearest to each target [..., N]; of two, the first."""
    index = (target[..., None] - values).abs().argmin(-1)
    return index, values.expand(*index.shape, -1).gather(-1, index[..., None])[..., 0]
