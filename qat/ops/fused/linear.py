"""A training linear ready to run: `qat.ops.bitlinear` to the bit, by one compiled op forward and one backward.

What `qat.ops` puts together in Python is a dozen calls a layer and pass. They cost nothing beside a large layer's arithmetic; of
a small one, or on a GPU, they are all the time there is. Here a layer's options are looked at once, and then only what may change
from call to call. Whoever wants to see the ops (torch.compile, modes, functorch) or brings tensors of a kind of their own
(DTensor, gathered codes) gets those of `qat.ops`, and so does a quantizer that the one op does not know.

The node of the autograd graph is in C++ as well (csrc/ops_autograd.cpp): one in Python takes as long as all the calls of kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.config import QuantConfig
from qat.ops.bits import kept
from qat.ops.operands import DTYPES
from qat.quantizers.record import Quantizer

_PLAIN = frozenset({Tensor, nn.Parameter})


@dataclass(frozen=True)
class Ops:
    """What a device has: `forward(x, w, bias, dtype, *arguments)` gives y first, and y knows its backward pass."""

    forward: Callable[..., Any]
    arguments: tuple[Any, ...]
    soft: Ops | None = None
    """While the weight is soft: `forward(x, w, bias, beta, dtype, *arguments)`."""


class FusedLinear:
    """A layer's call; it serves while configuration, shape and device are those that it was made for."""

    __slots__ = ("arguments", "config", "device", "forward", "k", "kind", "known", "row", "shape", "soft")

    def __init__(self, config: QuantConfig, shape: torch.Size, device: torch.device, ops: Ops | None) -> None:
        self.config, self.known, self.shape, self.device = config, dict(vars(config)), shape, device
        self.row, self.k, self.kind = config.quantizer, shape[-1], device.type
        self.forward = self.soft = None
        if ops is not None:
            self.forward, self.arguments, self.soft = ops.forward, ops.arguments, ops.soft

    def of(self, config: QuantConfig, weight: Tensor) -> bool:
        """Whether it was made for such a layer, also where it does not serve one."""
        return (
            config is self.config
            and vars(config) == self.known
            and config.quantizer is self.row  # another row may have taken its name
            and weight.shape == self.shape
            and weight.device == self.device
        )

    def serves(self, x: Tensor, weight: Tensor, bias: Tensor | None, beta: Tensor | None = None) -> bool:
        """Whether these need no other treatment and no error message; with soft codes of sharpness `beta` where one is given."""
        return (
            self.forward is not None
            and (beta is None or (self.soft is not None and beta.is_cpu and beta.dtype == torch.float32))
            and type(x) in _PLAIN
            and type(weight) in _PLAIN
            and x.dtype in DTYPES
            and x.device == self.device
            and x.ndim > 0
            and x.shape[-1] == self.k
            and x.numel() > 0
            and weight.dtype == torch.float32
            and weight.is_contiguous()
            and (bias is None or self._fits(bias))
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._are_functorch_transforms_active()
        )

    def _fits(self, bias: Tensor) -> bool:
        fits = bias.is_floating_point() and bias.shape == self.shape[:1]
        return fits and type(bias) in _PLAIN and bias.device == self.device

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, beta: Tensor | None = None) -> Tensor:
        dtype = torch.get_autocast_dtype(self.kind) if torch.is_autocast_enabled(self.kind) else x.dtype
        if beta is not None and self.soft is not None:
            return self.soft.forward(x, weight, bias, beta, dtype, *self.soft.arguments)[0]  # type: ignore[no-any-return]
        assert self.forward is not None
        return self.forward(x, weight, bias, dtype, *self.arguments)[0]  # type: ignore[no-any-return]


def fits(config: QuantConfig, record: Quantizer) -> bool:
    """Whether one op can do on any device what the configuration asks for: codes of a statistic, straight through."""
    plain = not record.parameters and record.gradient is None and record.bias is None and not record.ratios
    known = config.planes == 1 and record.statistical and config.act_bits == 8 and kept.in_bits(record)
    return plain and known and config.kernels != "reference" and config.backward != "int8"
