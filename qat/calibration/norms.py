"""Norms of layers' own inputs (SubLN, `quant.rms_norm_eps`) that a pretrained model has not had, fitted to its text.

A norm of weight 1 in front of every layer destroys a pretrained model. What a norm takes from a token is its length, so it cannot
be made the identity; but it can come near it on real inputs, and the matrix behind it can learn the rest:

    g_k = sum_t x_tk u_tk / sum_t u_tk^2          with u = x / rms(x): norm(x) = g u nearest to x in least squares, by channel
    W'  = argmin |N W'^T - X W^T|^2 + r |W' - W|^2          with N the rows norm(x), X the rows x, r a share of the mean of N^T N

X are the inputs of each layer in the full-precision model, all at once: one run over the text. The ridge keeps the weights where
inputs say nothing. It is near the identity, not the identity: `rms_norm_start=blended` is that at step 0.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.conversion.layers import bitlinears
from qat.nn.bitlinear import BitLinear
from qat.nn.norm import RMSNorm
from qat.quantizers.hadamard import rotate

RIDGE = 0.01


class Inputs:
    """Sums over a layer's inputs [T, K] in float64, from which its norm and its weight follow."""

    def __init__(self, layer: BitLinear) -> None:
        assert layer.rms_norm is not None
        k, device = layer.in_features, layer.weight.device
        self.layer, self.eps, self.tokens = layer, layer.rms_norm.eps, 0
        self.second = torch.zeros(k, k, dtype=torch.float64, device=device)
        """U^T U of u = x / rms(x)."""
        self.cross = torch.zeros(k, k, dtype=torch.float64, device=device)
        """U^T X."""

    def add(self, x: Tensor) -> None:
        """Inputs [..., K]."""
        x = x.detach().flatten(0, -2).double()
        u = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        self.second += u.T @ u
        self.cross += u.T @ x
        self.tokens += len(x)

    def gains(self) -> Tensor:
        """The norm's weight [K]; 1 for a channel that was always 0."""
        power = self.second.diagonal()
        return torch.where(power > 0, self.cross.diagonal() / power.clamp_min(torch.finfo(power.dtype).tiny), 1.0)

    def weight(self, gains: Tensor) -> Tensor:
        """W' [N, K], float64, for inputs that are normed with these gains."""
        second, cross = gains[:, None] * self.second * gains, gains[:, None] * self.cross
        ridge = RIDGE * second.diagonal().mean() * torch.eye(len(gains), dtype=second.dtype, device=second.device)
        weight = _unrotated(self.layer, self.layer.weight.detach()).double()
        solved: Tensor = torch.linalg.solve(second + ridge, (cross + ridge) @ weight.T)
        return solved.T


def calibrate_norms(base: nn.Module, model: nn.Module, windows: Sequence[Tensor]) -> dict[str, Any]:
    """Fit the norms of `model`, converted from `base`, and the weights behind them to inputs of a text, in place; facts.

    Args:
        windows: input_ids int64 [B, T] each, on the models' device.

    A layer that saw no token (an expert) keeps what it had; the facts count those. Sums of all layers take 16 K^2 bytes each.
    """
    begin = time.perf_counter()
    seen = {name: Inputs(layer) for name, layer in bitlinears(model) if layer.rms_norm is not None}
    handles = [base.get_submodule(name).register_forward_pre_hook(_noting(one), with_kwargs=True) for name, one in seen.items()]
    try:
        with torch.no_grad():
            for ids in windows:
                base(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    for one in seen.values():
        if one.tokens:
            _set(one)
    return {
        "norms": sum(one.tokens > 0 for one in seen.values()),
        "norms_unseen": sum(one.tokens == 0 for one in seen.values()),
        "tokens": sum(ids.numel() for ids in windows),
        "seconds": time.perf_counter() - begin,
    }


def _noting(inputs: Inputs) -> Any:
    return lambda module, args, kwargs: inputs.add(next(iter((*args, *kwargs.values()))))


@torch.no_grad()
def _set(inputs: Inputs) -> None:
    layer, gains = inputs.layer, inputs.gains()
    assert isinstance(layer.rms_norm, RMSNorm)
    layer.rms_norm.weight.copy_(gains)
    layer.weight.copy_(_unrotated(layer, inputs.weight(gains)))
    layer.reset_quantizer()


def _unrotated(layer: BitLinear, weight: Tensor) -> Tensor:
    """The weight of inputs as they come, for that of rotated ones, and back: the rotation is its own inverse."""
    return rotate(weight) if layer.config.act_hadamard else weight
