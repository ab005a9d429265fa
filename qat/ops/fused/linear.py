"""A training linear ready to run: `qat.ops.bitlinear` to the bit, by one compiled op forward and one backward.

What `qat.ops` puts together in Python is a dozen calls a layer and pass. They cost nothing beside a large layer's arithmetic; of
a small one, or on a GPU, they are all the time there is. Here a layer's options are looked at once, and then only what may change
from call to call. Whoever wants to see the ops (torch.compile, modes, functorch) or brings tensors of a kind of their own
(DTensor, gathered codes) gets those of `qat.ops`, and so does a quantizer that the one op does not know.

Rejected: the autograd node in C++ as well. It needs torch's unstable headers, half a minute more to compile at the first use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qat.config import QuantConfig
from qat.ops.bits import kept
from qat.ops.operands import DTYPES
from qat.quantizers.record import Quantizer

_PLAIN = frozenset({Tensor, nn.Parameter})


@dataclass(frozen=True)
class Ops:
    """What a device has: `forward(x, w, bias, dtype, *arguments)` and `backward(grad, *kept, k, bf16, of_x, of_w, of_bias)`."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    arguments: tuple[Any, ...]
    soft: Ops | None = None
    """While the weight is soft: `forward(x, w, bias, beta, dtype, *arguments)`, `backward(grad, *kept, of_x, of_w, of_bias)`."""


class FusedLinear:
    """A layer's call; it serves while configuration, shape and device are those that it was made for."""

    __slots__ = ("arguments", "backward", "bf16", "config", "device", "forward", "k", "known", "row", "shape", "soft")

    def __init__(self, config: QuantConfig, shape: torch.Size, device: torch.device, ops: Ops | None) -> None:
        self.config, self.known, self.shape, self.device = config, dict(vars(config)), shape, device
        self.row, self.k, self.bf16 = config.quantizer, shape[-1], config.backward == "bf16"
        self.forward = self.backward = self.soft = None
        if ops is not None:
            self.forward, self.backward, self.arguments, self.soft = ops.forward, ops.backward, ops.arguments, ops.soft

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
        dtype, kind = x.dtype, self.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        if torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)):
            if beta is not None:
                return _Soft.apply(self.soft, dtype, beta, x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
            return _Linear.apply(self, dtype, x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
        if beta is not None and self.soft is not None:
            return self.soft.forward(x, weight, bias, beta, dtype, *self.soft.arguments)[0]  # type: ignore[no-any-return]
        assert self.forward is not None
        return self.forward(x, weight, bias, dtype, *self.arguments)[0]  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """Saves what `qat.ops.gradients.BitLinear` saves."""

    @staticmethod
    def forward(ctx: Any, call: FusedLinear, dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert call.forward is not None
        y, x_q, x_scale, codes, scale = call.forward(x, weight, bias, dtype, *call.arguments)
        ctx.save_for_backward(x_q, x_scale, codes, scale)
        ctx.made_for = call, x.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiated(ctx, grad) if torch.is_grad_enabled() else _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    _, _, x, weight, bias = ctx.needs_input_grad
    call, of_x, of_bias = ctx.made_for
    asked = of_x if x else None, weight, of_bias if bias else None
    return None, None, *call.backward(grad, *ctx.saved_tensors, call.k, call.bf16, *asked)


_differentiated = once_differentiable(_backward)  # type: ignore[no-untyped-call]
"""Where a graph of the backward pass is asked for; wrapping each call would cost as much as one of torch's ops."""


class _Soft(torch.autograd.Function):
    """Saves what `qat.ops.soft.gradients.SoftBitLinear` saves."""

    @staticmethod
    def forward(ctx: Any, ops: Ops, dtype: torch.dtype, beta: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y, x_q, x_scale, soft, slope = ops.forward(x, weight, bias, beta, dtype, *ops.arguments)
        ctx.save_for_backward(x_q, x_scale, soft, slope)
        ctx.made_for = ops, x.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return _soft_differentiated(ctx, grad) if torch.is_grad_enabled() else _soft_backward(ctx, grad)


def _soft_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None
    _, _, _, x, weight, bias = ctx.needs_input_grad
    ops, of_x, of_bias = ctx.made_for
    found = ops.backward(grad, *ctx.saved_tensors, of_x if x else None, weight, of_bias if bias else None)
    return None, None, None, *found


_soft_differentiated = once_differentiable(_soft_backward)  # type: ignore[no-untyped-call]


def fits(config: QuantConfig, record: Quantizer) -> bool:
    """Whether one op can do on any device what the configuration asks for: codes of a statistic, straight through."""
    plain = not record.parameters and record.gradient is None and record.bias is None and not record.ratios
    known = config.planes == 1 and record.statistical and config.act_bits == 8 and kept.in_bits(record)
    return plain and known and config.kernels != "reference" and config.backward != "int8"
