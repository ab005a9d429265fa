"""The soft ops in pure torch.

Nothing has to be equal to the bit here, as nothing of it is deployed: the soft weight is multiplied in floating point.
Legend: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.ops.options import TrainingOptions, WeightOptions, weight_options
from qat.ops.reference import dequantize
from qat.quantizers import activations, soft


def soft_quantize(
    w: Tensor, beta: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype, *options: Any
) -> tuple[Tensor, Tensor]:
    """See `qat.ops.soft.calls.soft_quantize`; `options` are WeightOptions."""
    return soft.soft_weight(w, beta, parameters, dtype, WeightOptions(*options))


def rounded(x: Tensor, granularity: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(what the codes of x [..., K] stand for, in its dtype; the codes int8 [..., K]; their scale float32 [..., 1])."""
    codes, scale = activations.quantize_activation(x, granularity, eps)
    return dequantize(codes, scale, x.dtype), codes, scale


def soft_bitlinear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    beta: Tensor,
    parameters: Sequence[Tensor],
    *options: Any,
    soften: Callable[..., tuple[Tensor, Tensor]] = soft_quantize,
    activation: Callable[..., tuple[Tensor, Tensor, Tensor]] = rounded,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, x_q, x_scale, soft weight, slope): the output and what the backward pass needs, one byte an activation.

    `options` are TrainingOptions; `soften` and `activation` a device's. With act_bits None, x_q and x_scale are empty and the
    backward pass reads x itself.
    """
    o = TrainingOptions(*options)
    weight, slope = soften(w, beta, parameters, x.dtype, *weight_options(o))
    if o.act_bits is None:
        return _linear(x, weight, bias), x.new_empty(0, dtype=torch.int8), x.new_empty(0, dtype=torch.float32), weight, slope
    values, x_q, x_scale = activation(x, o.act_granularity, o.eps)
    return _linear(values, weight, bias), x_q, x_scale, weight, slope


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
