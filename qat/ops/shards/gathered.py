"""A weight of which only codes and scales are here, gathered from all devices; and the linear of it.

To autograd it is a float32 weight [N, K], whose gradient FSDP2 reduces; there are no such floats, and whoever asks for them is
told. What the layer keeps for its backward pass is the gathered codes themselves: FSDP2 frees their memory and fills it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.config import QuantConfig
from qat.ops.checks import cast_for_autocast, check_bias, check_device, check_input
from qat.ops.gradients import BitLinear, below, remember
from qat.ops.options import training_options

_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.as_strided.default, _aten.view.default, _aten.alias.default)


class GatheredCodes(Tensor):
    """Codes [N, planes * K] as `qat.ops.bits.kept` keeps them and scales float32 [1 | N, planes * G] of a weight [N, K]."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, shape: torch.Size) -> GatheredCodes:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=codes.device)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, codes: Tensor, scale: Tensor, shape: torch.Size) -> None:
        self.codes, self.scale = codes, scale

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GatheredCodes({list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _SAME:
            one = args[0]
            return cls(one.codes, one.scale, one.shape)
        if func is _aten.zeros_like.default:  # the gradient of a weight that took no part
            return torch.zeros(args[0].shape, device=args[0].device)
        raise RuntimeError(f"{func} needs a weight's floats, of which only codes were gathered")


class _Linear(torch.autograd.Function):
    """The backward pass is `BitLinear`'s, on the codes that were gathered."""

    @staticmethod
    def forward(ctx: Any, op: Any, options: Any, x: Tensor, weight: GatheredCodes, bias: Tensor | None) -> Tensor:
        y, x_q, x_scale = below(op, x, weight.codes, weight.scale, bias, *options)
        remember(ctx, options, (x, weight, bias), (x_q, x_scale, weight.codes, weight.scale))
        return y  # type: ignore[no-any-return]

    backward = BitLinear.backward  # type: ignore[assignment]


def linear(x: Tensor, weight: GatheredCodes, bias: Tensor | None, config: QuantConfig, op: Any) -> Tensor:
    """`qat.ops.bitlinear` of a weight that is codes already; `op` is `coded_bitlinear` as `qat.ops.pick` gives it."""
    check_input(x, weight.shape[1])
    check_bias(bias, weight.shape[0])
    check_device(x, weight=weight, bias=bias)
    x, options = cast_for_autocast(x), training_options(config)
    if not torch.is_grad_enabled():
        return below(op, x, weight.codes, weight.scale, bias, *options)[0]  # type: ignore[no-any-return]
    return _Linear.apply(op, options, x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
