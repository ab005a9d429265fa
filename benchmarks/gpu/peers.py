"""The layers that ours are measured beside, each as its own library or its usual text has it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fake_quantized_activation(x: Tensor) -> Tensor:
    """The b1.58 activation as commonly written: quantized values in floating point."""
    s = 127 / x.abs().amax(-1, keepdim=True).clamp_min(1e-5)
    return (x * s).round().clamp(-128, 127) / s


def fake_quantized_weight(w: Tensor) -> Tensor:
    """The b1.58 weight likewise."""
    a = w.abs().mean().clamp_min(1e-5)
    return (w / a).round().clamp(-1, 1) * a


def fake_quant_linear(x: Tensor, w: Tensor) -> Tensor:
    """The layer of both, straight through."""
    x = x + (fake_quantized_activation(x) - x).detach()
    w = w + (fake_quantized_weight(w) - w).detach()
    return F.linear(x, w.to(x.dtype))


class FakeQuantLinear(nn.Linear):
    """nn.Linear with `fake_quant_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return fake_quant_linear(x, self.weight)


def int8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and scales of activations, as anyone would write them in torch."""
    absmax = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-5)
    return (x.float() * (127 / absmax)).round().clamp(-128, 127).to(torch.int8), absmax / 127


def ternary_codes(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and the scale of a weight, likewise."""
    scale = w.float().abs().mean().clamp_min(1e-5)
    return (w / scale).round().clamp(-1, 1).to(torch.int8), scale


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile of it, once a process, so that copies of the data share one compilation."""
    return torch.compile(function, dynamic=False)


def auto_bit_linear(n: int, k: int, online: bool, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """transformers' BitNet layer: online for training, offline with weights that are quantized already."""
    from transformers.integrations.bitnet import AutoBitLinear

    layer = AutoBitLinear(k, n, bias=False, device=device, dtype=dtype, online_quant=online)
    return layer.to(device=device, dtype=dtype)  # which transformers before 5.23 leaves as it is
