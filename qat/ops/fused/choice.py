"""The one op by device."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qat.config import QuantConfig
from qat.ops.fused import cpu, cuda
from qat.ops.fused.linear import FusedLinear, Ops

_DEVICES: dict[str, Callable[[QuantConfig, Tensor], Ops | None]] = {"cpu": cpu.ops_for, "cuda": cuda.ops_for}


def fused(config: QuantConfig, weight: Tensor) -> FusedLinear:
    """What runs a layer of this configuration and weight [N, K] in one op, or says that it does not serve it."""
    find = _DEVICES.get(weight.device.type)
    return FusedLinear(config, weight.shape, weight.device, None if find is None else find(config, weight))
