"""int8 activations: x_q = clip(round(x * 127 / max|x|)), with x ~ x_q * s and s = max(max|x|, eps) / 127.

Source: BitNet, arXiv:2310.11453, eq. 4-5; per token in b1.58, arXiv:2402.17764. All math is float32 whatever the input's dtype;
rounding is half to even.
"""

from __future__ import annotations

import torch
from torch import Tensor


def activation_codes(x: Tensor, granularity: str, eps: float, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., K] and the dividing scale 127 / max|x| float32 [..., 1] of x [..., K], as the papers write it.

    Of 4 bits they are in -7 to 7, and the scale is 7 / max|x|.

    Raises:
        ValueError: x has no dimension or is not floating point.
    """
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor [..., K], not {x.dtype} {list(x.shape)}")
    x, most = x.float(), 2 ** (bits - 1) - 1
    if x.numel() == 0:
        return torch.zeros_like(x, dtype=torch.int8), x.new_full((*x.shape[:-1], 1), most / eps)
    absmax = x.abs().amax(-1, keepdim=True) if granularity == "token" else x.abs().amax().expand(*x.shape[:-1], 1)
    divisor = most / absmax.clamp_min(eps)
    return (x * divisor).round().clamp(-most - 1, most).to(torch.int8), divisor


def quantize_activation(x: Tensor, granularity: str, eps: float) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., K] and the multiplying scale float32 [..., 1] of x [..., K]: `activation_codes`, inverted.

    With `granularity="tensor"` every token carries the same scale. An all-zero token gives zeros.
    """
    codes, divisor = activation_codes(x, granularity, eps)
    return codes, (1 / divisor).contiguous()


def rounded_activation(x: Tensor, granularity: str, eps: float, bits: int) -> Tensor:
    """What the codes of x [..., K] stand for, in its dtype: codes times the multiplying scale, exactly; straight-through."""
    codes, divisor = activation_codes(x.detach(), granularity, eps, bits)
    return (codes * (1 / divisor)).to(x.dtype) + (x - x.detach())
