"""A training linear ready to run: `qat.ops.bitlinear` to the bit, by one compiled op forward and one backward.

What `qat.ops` puts together in Python is a dozen calls a layer and pass. They cost nothing beside a large layer's arithmetic; of
a small one, or on a GPU, they are all the time there is. Here a layer's options are looked at once, and then only what may change
from call to call. Whoever wants to see the ops (torch.compile, modes, functorch) or brings tensors of a kind of their own
(DTensor, gathered codes) gets those of `qat.ops`, and so does a quantizer that the one op does not know.

The node of the autograd graph is in C++ as well (csrc/ops_autograd.cpp): one in Python takes as long as all the calls of kernels.
So is what shapes, dtypes and devices must be: the op gives None for those that it does not serve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.config import QuantConfig
from qat.ops.bits import kept
from qat.quantizers import QUANTIZERS
from qat.quantizers.record import Quantizer

_PLAIN = frozenset({Tensor, nn.Parameter})


@dataclass(frozen=True)
class Ops:
    """What a device has: `forward(x, w, bias, *arguments)` gives y, which knows its backward pass, or None."""

    forward: Callable[..., Any]
    arguments: tuple[Any, ...]
    soft: Ops | None = None
    """While the weight is soft: `forward(x, w, bias, beta, *arguments)`."""


class FusedLinear:
    """A layer's call; it serves while configuration, shape and device are those that it was made for."""

    __slots__ = ("arguments", "config", "device", "forward", "known", "row", "shape", "soft")

    def __init__(self, config: QuantConfig, shape: torch.Size, device: torch.device, ops: Ops | None) -> None:
        self.config, self.known, self.shape, self.device = config, dict(vars(config)), shape, device
        self.row = QUANTIZERS.get(config.weight)
        self.forward = self.soft = None
        if ops is not None:
            self.forward, self.arguments, self.soft = ops.forward, ops.arguments, ops.soft

    def of(self, config: QuantConfig, weight: Tensor) -> bool:
        """Whether it was made for such a layer, also where it does not serve one."""
        return (
            config is self.config
            and vars(config) == self.known
            and QUANTIZERS.get(config.weight) is self.row  # another row may have taken its name
            and weight.shape == self.shape
            and weight.device == self.device
        )

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, beta: Tensor | None = None) -> Tensor | None:
        """The layer's output [..., N], with soft codes of sharpness `beta` where one is given.

        None where these need another treatment, or an error message.
        """
        if (
            self.forward is None
            or type(x) not in _PLAIN
            or type(weight) not in _PLAIN
            or (bias is not None and type(bias) not in _PLAIN)
            or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
        ):
            return None
        if beta is None:
            return self.forward(x, weight, bias, *self.arguments)  # type: ignore[no-any-return]
        soft = self.soft
        return None if soft is None else soft.forward(x, weight, bias, beta, *soft.arguments)  # type: ignore[no-any-return]


def fits(config: QuantConfig, record: Quantizer) -> bool:
    """Whether one op can do on any device what the configuration asks for: codes of a statistic, straight through."""
    plain = not record.parameters and record.gradient is None and record.bias is None and not record.ratios
    known = config.planes == 1 and record.statistical and config.act_bits == 8 and kept.in_bits(record)
    return plain and known and config.kernels != "reference" and config.backward != "int8"
