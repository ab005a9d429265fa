"""Rotation of a layer's input by a Hadamard matrix, which spreads outliers over their block (QuaRot, arXiv:2404.00456).

A quantized input has one scale a token, its largest value's. Where one channel is far above the others, those become zeros at 4
bits. x H has the length of x and values that are nearly normal, and since H H^T = 1, W x = (W H^T)(H x): rotated weights on
rotated inputs are the same function. What is quantized then are W H^T and H x.

H is block diagonal with Sylvester's matrix of order B, the largest power of two that divides K, times B^-1/2: symmetric, so that
it is its own inverse. It is applied by sums and differences, K log2 B of them (fast Walsh-Hadamard), and never formed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_of(width: int) -> int:
    """The largest power of two that divides the width."""
    return width & -width


def check_rotated(width: int, rotated: bool) -> None:
    """ValueError where inputs of this width are to be rotated and are not by any block but of 1."""
    if rotated and block_of(width) == 1:
        raise ValueError(f"quant.act_hadamard needs an even in_features, not {width}; exclude the layer (model.exclude)")


def rotate(x: Tensor) -> Tensor:
    """x H of x [..., K], computed in float32, in x's dtype; rotated again it is x, but for rounding."""
    width, block = x.shape[-1], block_of(x.shape[-1])
    y, half = x.float().unflatten(-1, (width // block, block)), 1
    while half < block:
        a, b = y.unflatten(-1, (block // (2 * half), 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return (y * block**-0.5).flatten(-2).to(x.dtype)
