"""Checks of the ops' arguments; a message names the argument and what was expected."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def need(condition: bool, message: Callable[[], str]) -> None:
    """The message is made only where it is needed: describing a tensor takes longer than checking it."""
    if not condition:
        raise ValueError(message())


def describe(x: Tensor) -> str:
    """Its dtype, shape and device, for a message."""
    return f"{x.dtype} {list(x.shape)} on {x.device}"


def check_input(x: Tensor, k: int) -> None:
    """ValueError unless x is a floating-point tensor [..., k]."""
    need(x.is_floating_point() and x.ndim >= 1, lambda: f"x must be a floating-point tensor [..., {k}], not {describe(x)}")
    need(x.shape[-1] == k, lambda: f"x has {x.shape[-1]} features in its last dimension, but the layer has in_features={k}")


def check_activation(name: str, granularity: str, eps: float) -> None:
    """ValueError unless activations can be quantized so."""
    need(granularity in ("token", "tensor"), lambda: f"{name}={granularity!r} is not allowed; choose token or tensor")
    need(eps > 0, lambda: f"eps={eps} is not allowed; it must be above 0")


def check_bias(bias: Tensor | None, n: int) -> None:
    """ValueError unless the bias is floating point [n], or None."""
    if bias is not None:
        need(bias.is_floating_point() and bias.shape == (n,), lambda: f"bias must be floating point [{n}], not {describe(bias)}")


def check_device(x: Tensor, **others: Tensor | None) -> None:
    """ValueError unless all lie on x's device."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")


def cast_for_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on for its device, else x itself."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x
