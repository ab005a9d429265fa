"""A packed linear ready to run: for one token the checks and look-ups of the op would cost as much as the arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.ops import cpu, cuda
from qat.ops.operands import DTYPES
from qat.ops.options import PackedOptions

_CALLS = {"cpu": cpu.linear_call, "cuda": cuda.linear_call}


class PreparedLinear:
    """It holds the tensors that it was made from and serves a call only while they are the same objects, unchanged.

    Slots, because between two calls of a large model everything here has left the caches.
    """

    __slots__ = ("arguments", "device", "k", "later", "run", "sources", "versions")

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor | None, k: int, call: tuple[Any, ...]) -> None:
        self.k, self.sources, self.device = k, (packed, scale, bias), packed.device
        self.versions = packed._version, scale._version, 0 if bias is None else bias._version
        self.run, self.arguments, self.later = call

    def unchanged(self, packed: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
        """Whether these are the tensors it was made from, unmodified since."""
        sources, versions = self.sources, self.versions
        return (
            packed is sources[0]
            and scale is sources[1]
            and bias is sources[2]
            and packed._version == versions[0]
            and scale._version == versions[1]
            and (bias is None or bias._version == versions[2])
        )

    def serves(self, x: Tensor) -> bool:
        """Whether x needs nothing but the kernel: no gradient, no autocast, no conversion and no error message."""
        return (
            x.dtype in DTYPES
            and x.device == self.device
            and x.ndim > 0
            and x.shape[-1] == self.k
            and not torch.is_autocast_enabled(self.device.type)
            and not (
                torch.is_grad_enabled() and (x.requires_grad or (self.sources[2] is not None and self.sources[2].requires_grad))
            )
        )

    def __call__(self, x: Tensor) -> Tensor:
        arguments, self.arguments = self.arguments, self.later
        return self.run(x, *arguments)


def prepare(packed: Tensor, scale: Tensor, bias: Tensor | None, options: PackedOptions) -> PreparedLinear | None:
    """A `PreparedLinear`, or None where the compiled kernels do not serve or a tensor does not count its versions."""
    tensors = [t for t in (packed, scale, bias) if t is not None]
    if any(type(t) not in (Tensor, torch.nn.Parameter) or t.device != packed.device or t.is_inference() for t in tensors):
        return None
    make = _CALLS.get(packed.device.type)
    call = make(packed, scale, bias, options) if make and options.act_bits is not None else None
    return None if call is None else PreparedLinear(packed, scale, bias, options.in_features, call)
