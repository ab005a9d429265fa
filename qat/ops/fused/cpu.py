"""Which training linears one op of the CPU's serves, and how it is told of them."""

from __future__ import annotations

from typing import Any

import torch

from qat.config import QuantConfig
from qat.ops import cpu
from qat.ops.fused.linear import Ops, fits
from qat.ops.operands import MAX_WIDTH
from qat.quantizers.record import resolve
from qat.quantizers.scales import scale_limits, scale_shape

MOST_WEIGHTS = 2**16
"""The op quantizes the weight anew at each call. The ops that it stands for look whether it has changed, and keep what they made:
that takes a large layer no longer, and spares it in evaluation and between the batches of a step."""
_ROUNDED = {"float32": 0, "bfloat16": 1, "float16": 2}


def ops_for(config: QuantConfig, weight: torch.Tensor) -> Ops | None:
    """The ops of a layer; None where others serve it."""
    (n, k), record = weight.shape, config.quantizer
    binary = cpu._CODES.get(resolve(record.codes))
    if binary is None or not fits(config, record) or config.scale != "absmean":
        return None
    if not 0 < n * k <= MOST_WEIGHTS or k > MAX_WIDTH or not cpu.compiled():
        return None
    rows, groups = scale_shape(n, k, config.granularity, config.group_size)
    least, most = scale_limits(config.scale_dtype)
    per_tensor, qat = config.act_granularity == "tensor", torch.ops.qat
    of_weight = rows * groups, groups, binary, config.scale_multiplier, least, most, _ROUNDED[config.scale_dtype]
    return Ops(
        qat.cpu_fused_linear.default,
        (*of_weight, per_tensor, config.eps, config.backward == "bf16"),
        None if per_tensor or config.backward != "input" else _soft((*of_weight, config.eps)),
    )


def _soft(arguments: tuple[Any, ...]) -> Ops:
    return Ops(torch.ops.qat.cpu_fused_soft.default, arguments)
