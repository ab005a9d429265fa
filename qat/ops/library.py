"""The ops as torch.library knows them: schema, reference implementation, fake (shapes), autograd.

Every op exists twice. `qat::NAME` takes compiled kernels where a device has them (`cpu` decides for the CPU, at the
first call); `qat::NAME_reference` is pure torch on every device: what `kernels=reference` calls.
The gradients are straight-through (arXiv:1308.3432): the identity through round, sign and clip, so the backward
pass is two matmuls on the quantized operands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat import packing, quantizers
from qat.ops import cpu, reference

_LIBRARY = torch.library.Library("qat", "DEF")


def _fake_quantize_activation(x: Tensor, granularity: str, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _fake_quantize_weight(
    w: Tensor, weight: str, scale: str, granularity: str, group_size: int | None, scale_dtype: str, eps: float
) -> tuple[Tensor, Tensor]:
    shape = quantizers.scale_shape(w.shape[0], w.shape[1], granularity, group_size)
    return w.new_empty(w.shape, dtype=torch.int8), w.new_empty(shape, dtype=torch.float32)


def _fake_pack_ternary(t: Tensor, layout: str) -> Tensor:
    return t.new_empty((t.shape[0], packing.get_layout(layout).row_bytes(t.shape[1])), dtype=torch.uint8)


def _fake_unpack_ternary(packed: Tensor, k: int, layout: str) -> Tensor:
    return packed.new_empty((packed.shape[0], k), dtype=torch.int8)


def _fake_packed_linear(x: Tensor, packed: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _fake_bitlinear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: str,
    scale: str,
    granularity: str,
    group_size: int | None,
    scale_dtype: str,
    act_bits: int | None,
    act_granularity: str,
    eps: float,
    backward: str,
) -> tuple[Tensor, ...]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    x_q, x_scale = _fake_quantize_activation(x, act_granularity, eps)
    if act_bits is None:
        x_q, x_scale = x_q.new_empty(0), x_scale.new_empty(0)
    return y, x_q, x_scale, *_fake_quantize_weight(weight, scheme, scale, granularity, group_size, scale_dtype, eps)


def _fake_quantized_matmul(x: Tensor, t: Tensor, eps: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], t.shape[1]))


def _fake_dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _bias_gradient(grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)


def _save_bitlinear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias = inputs[:3]
    _, x_q, x_scale, t, w_scale = output
    ctx.quantized, ctx.matmuls = inputs[8] is not None, _MATMULS[inputs[11]]
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(x_q if ctx.quantized else x, x_scale, t, w_scale)
    ctx.mark_non_differentiable(x_q, x_scale, t, w_scale)
    ctx.set_materialize_grads(False)


def _input_gradient(grad: Tensor, t: Tensor, w_scale: Tensor) -> Tensor:
    return grad @ torch.ops.qat.dequantize(t, w_scale, grad.dtype)


def _input_weight_gradient(grad: Tensor, x: Tensor, x_scale: Tensor) -> Tensor:
    values = torch.ops.qat.dequantize(x, x_scale, grad.dtype) if x.dtype == torch.int8 else x.to(grad.dtype)
    return _weight_gradient(grad, values)


def _bf16_gradient(grad: Tensor, t: Tensor, w_scale: Tensor) -> Tensor:
    """The codes are exact in bfloat16; scales are applied outside of the matmul where their shape allows."""
    if w_scale.shape[1] > 1:
        return grad.bfloat16() @ torch.ops.qat.dequantize(t, w_scale, torch.bfloat16)
    if w_scale.shape[0] > 1:
        return (grad * w_scale.t()).bfloat16() @ t.bfloat16()
    return (grad.bfloat16() @ t.bfloat16()) * w_scale.reshape(())


def _bf16_weight_gradient(grad: Tensor, x: Tensor, x_scale: Tensor) -> Tensor:
    return _weight_gradient((grad * x_scale).bfloat16(), x.bfloat16())


def _int8_gradient(grad: Tensor, t: Tensor, w_scale: Tensor) -> Tensor:
    """Rows of the gradient (times the channels' scales) in int8, each with its own scale; exact integer sums."""
    if w_scale.shape[0] > 1:
        return torch.ops.qat.quantized_matmul(grad * w_scale.t(), t, _TINY)
    return torch.ops.qat.quantized_matmul(grad, t, _TINY) * w_scale.reshape(())


def _int8_weight_gradient(grad: Tensor, x: Tensor, x_scale: Tensor) -> Tensor:
    """The gradient (times the tokens' scales) in int8 with one scale an output row, which the sum over tokens allows."""
    rows = (grad.float() * x_scale).reshape(-1, grad.shape[-1]).t().contiguous()
    codes, scale = torch.ops.qat.quantize_activation(rows, "token", _TINY)
    return torch._int_mm(codes, x.reshape(-1, x.shape[-1])) * scale


_TINY = 1e-30
"""Lower bound of a gradient's scale: gradients may be far below the eps of activations."""

_MATMULS = {
    "input": (_input_gradient, _input_weight_gradient),
    "bf16": (_bf16_gradient, _bf16_weight_gradient),
    "int8": (_int8_gradient, _int8_weight_gradient),
}


@once_differentiable
def _backward_bitlinear(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Matmuls on the quantized operands, by default in the precision of the gradient that arrives."""
    rest = (None,) * 9
    if grad is None:
        return None, None, None, *rest
    x, x_scale, t, w_scale = ctx.saved_tensors
    x_dtype, weight_dtype, bias_dtype = ctx.dtypes
    input_gradient, weight_gradient = ctx.matmuls
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = input_gradient(grad, t, w_scale).to(x_dtype)
    if ctx.needs_input_grad[1]:
        grad_weight = weight_gradient(grad, x, x_scale).to(weight_dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = _bias_gradient(grad).to(bias_dtype)
    return grad_x, grad_weight, grad_bias, *rest


def _save_packed_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, bias, ctx.in_features, ctx.layout = inputs[:6]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(packed, scale)


@once_differentiable
def _backward_packed_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """For adapters trained on top: gradients of the input and the bias; packed codes and their scale are frozen."""
    packed, scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        t = packing.decode(packed, ctx.in_features, ctx.layout)
        grad_x = _input_gradient(grad, t, scale)
    if ctx.needs_input_grad[3]:
        grad_bias = _bias_gradient(grad).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None, None, None, None


_WEIGHT = "str weight_scheme, str scale_kind, str granularity, int? group_size, str scale_dtype"

# name -> arguments and results, reference, fake
_OPS: dict[str, tuple[str, Any, Any]] = {
    "quantize_activation": (
        "(Tensor x, str granularity, float eps) -> (Tensor, Tensor)",
        reference.quantize_activation,
        _fake_quantize_activation,
    ),
    "quantize_weight": (
        f"(Tensor w, {_WEIGHT}, float eps) -> (Tensor, Tensor)",
        quantizers.quantize_weight,
        _fake_quantize_weight,
    ),
    "pack_ternary": ("(Tensor t, str layout) -> Tensor", packing.pack_ternary, _fake_pack_ternary),
    "unpack_ternary": ("(Tensor packed, int k, str layout) -> Tensor", packing.unpack_ternary, _fake_unpack_ternary),
    "packed_linear": (
        "(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int in_features, str layout,"
        " int? act_bits, str act_granularity, float eps) -> Tensor",
        reference.packed_linear,
        _fake_packed_linear,
    ),
    "bitlinear": (
        f"(Tensor x, Tensor weight, Tensor? bias, {_WEIGHT}, int? act_bits, str act_granularity, float eps,"
        " str backward) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference.bitlinear,
        _fake_bitlinear,
    ),
    "dequantize": ("(Tensor codes, Tensor scale, ScalarType dtype) -> Tensor", reference.dequantize, _fake_dequantize),
    "quantized_matmul": (
        "(Tensor x, Tensor t, float eps) -> Tensor",
        reference.quantized_matmul,
        _fake_quantized_matmul,
    ),
}


def _define(name: str, schema: str, fake: Any, implementation: Any) -> None:
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qat::{name}", fake, lib=_LIBRARY)


for _name, (_schema, _reference, _fake) in _OPS.items():
    _define(_name, _schema, _fake, _reference)
    _define(f"{_name}_reference", _schema, _fake, _reference)
    if _name in cpu.KERNELS:
        _LIBRARY.impl(_name, cpu.KERNELS[_name], "CPU")

for _twin in ("", "_reference"):
    torch.library.register_autograd(f"qat::bitlinear{_twin}", _backward_bitlinear, setup_context=_save_bitlinear, lib=_LIBRARY)
    torch.library.register_autograd(
        f"qat::packed_linear{_twin}", _backward_packed_linear, setup_context=_save_packed_linear, lib=_LIBRARY
    )
