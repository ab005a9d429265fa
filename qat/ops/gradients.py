"""The backward passes: matmuls on the quantized operands, and then the quantizer's gradient.

Unless its record has another, that is straight-through (arXiv:1308.3432), the identity through round, sign and clip.

The ops call them through autograd.Function themselves. torch.library.register_autograd would do the same, but reads the
op's schema at every call, and a small model makes hundreds of calls a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.ops.bits.kept import Kept, keep
from qat.ops.bits.reference import LAYOUT
from qat.ops.options import PackedOptions, TrainingOptions, WeightOptions
from qat.quantizers import latent, packing
from qat.quantizers.components import sum_components


def product(a: Tensor, b: Tensor, of: torch.dtype) -> Tensor:
    """a @ b of matrices, for a gradient of dtype `of`.

    float32 comes from 16-bit operands at once where torch has such a matmul, which is on CUDA: their sums are float32 there, and
    rounding them to 16 bits only to widen them again loses bits and costs two more passes over the gradient of a weight.
    """
    if of == torch.float32 and a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=of)
    return a @ b


def weight_gradient(grad: Tensor, x: Tensor, of: torch.dtype) -> Tensor:
    """For a weight of dtype `of`, which the result may not yet have."""
    return product(grad.reshape(-1, grad.shape[-1]).t(), x.reshape(-1, x.shape[-1]), of)


def bias_gradient(grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)


def _input_gradient(grad: Tensor, t: Kept, w_scale: Tensor, components: int = 1) -> Tensor:
    return grad @ _values(t, w_scale, grad.dtype, components)


def _values(t: Kept, w_scale: Tensor, dtype: torch.dtype, components: int) -> Tensor:
    """The weight [N, K] that codes [N, components * K] stand for; several are added in float32."""
    if components == 1:
        return t.values(w_scale, dtype)
    return sum_components(t.values(w_scale, torch.float32), components).to(dtype)


def input_weight_gradient(grad: Tensor, x: Tensor, x_scale: Tensor, of: torch.dtype) -> Tensor:
    values = torch.ops.qat.dequantize(x, x_scale, grad.dtype) if x.dtype == torch.int8 else x.to(grad.dtype)
    return weight_gradient(grad, values, of)


def _bf16_gradient(grad: Tensor, t: Kept, w_scale: Tensor, components: int) -> Tensor:
    """The codes are exact in bfloat16; scales are applied outside of the matmul where their shape allows."""
    if w_scale.shape[1] > 1:
        return grad.bfloat16() @ _values(t, w_scale, torch.bfloat16, components)
    if w_scale.shape[0] > 1:
        return (grad * w_scale.t()).bfloat16() @ t.alone(torch.bfloat16)
    return (grad.bfloat16() @ t.alone(torch.bfloat16)) * w_scale.reshape(())


def _bf16_weight_gradient(grad: Tensor, x: Tensor, x_scale: Tensor, of: torch.dtype) -> Tensor:
    return weight_gradient((grad * x_scale).bfloat16(), x.bfloat16(), of)


def _int8_gradient(grad: Tensor, t: Kept, w_scale: Tensor, components: int) -> Tensor:
    """Rows of the gradient (times the channels' scales) in int8, each with its own scale; exact integer sums."""
    assert components == 1  # QuantConfig refuses more
    codes = t.alone(torch.int8)
    if w_scale.shape[0] > 1:
        return torch.ops.qat.quantized_matmul(grad * w_scale.t(), codes, _TINY)
    return torch.ops.qat.quantized_matmul(grad, codes, _TINY) * w_scale.reshape(())


def _int8_weight_gradient(grad: Tensor, x: Tensor, x_scale: Tensor, of: torch.dtype) -> Tensor:
    """The gradient (times the tokens' scales) in int8 with one scale an output row, which the sum over tokens allows."""
    rows = (grad.float() * x_scale).reshape(-1, grad.shape[-1]).t().contiguous()
    codes, scale = torch.ops.qat.quantize_activation(rows, "token", _TINY)
    return torch.ops.qat.int8_matmul(codes, x.reshape(-1, x.shape[-1])) * scale


_TINY = 1e-30
"""Lower bound of a gradient's scale: gradients may be far below the eps of activations."""

_MATMULS = {
    "input": (_input_gradient, input_weight_gradient),
    "bf16": (_bf16_gradient, _bf16_weight_gradient),
    "int8": (_int8_gradient, _int8_weight_gradient),
}


def below(op: Any, *arguments: Any) -> Any:
    """The op without autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _through(ctx: Any, grad: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of the latent weight and of the quantizer's parameters, from that of the weight that was multiplied."""
    if not ctx.own:
        return grad, [None] * ctx.count
    codes, w_scale, w, *parameters = saved
    t = Kept(codes, w.shape[1] * ctx.options.planes).alone(torch.int8)
    return latent.gradient(grad, w, t, w_scale, ctx.options, parameters)


def _keep(ctx: Any, o: WeightOptions, w: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """What `_through` needs beside the codes: nothing for straight-through."""
    ctx.options, ctx.count, ctx.own = o, len(parameters), latent.record_of(o).gradient is not None
    return [w, *parameters] if ctx.own else []


def remember(ctx: Any, options: Any, inputs: Sequence[Any], kept: Sequence[Tensor]) -> None:
    """What `BitLinear.backward` needs: of (x, w, bias, *parameters), and of (x_q, x_scale, codes, w_scale)."""
    x, w, bias, *parameters = inputs
    x_q, x_scale, codes, w_scale = kept
    o = TrainingOptions(*options)
    ctx.matmuls, ctx.components, ctx.k = _MATMULS[o.backward], o.planes, w.shape[1] * o.planes
    ctx.dtypes = x.dtype, w.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(x if o.act_bits is None else x_q, x_scale, codes, w_scale, *_keep(ctx, o, w, parameters))
    ctx.set_materialize_grads(False)


class BitLinear(torch.autograd.Function):
    """Matmuls on the quantized operands, by default in the precision of the gradient that arrives."""

    @staticmethod
    def forward(
        ctx: Any, op: Any, options: Any, x: Tensor, w: Tensor, bias: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        output = below(op, x, w, bias, parameters, *options)
        remember(ctx, options, (x, w, bias, *parameters), output[1:])
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (5 + ctx.count)
        x, x_scale, codes, w_scale, *kept = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        input_gradient, weight_gradient = ctx.matmuls
        _, _, needs_x, needs_weight, needs_bias, *needs_parameters = ctx.needs_input_grad
        grad_x = input_gradient(grad, Kept(codes, ctx.k), w_scale, ctx.components).to(x_dtype) if needs_x else None
        grad_weight: Tensor | None = None
        rest: list[Tensor | None] = [None] * ctx.count
        if needs_weight or any(needs_parameters):
            grad_latent, rest = _through(ctx, weight_gradient(grad, x, x_scale, weight_dtype), [codes, w_scale, *kept])
            grad_weight = grad_latent.to(weight_dtype)
        grad_bias = bias_gradient(grad).to(bias_dtype) if needs_bias else None
        return None, None, grad_x, grad_weight, grad_bias, *rest


class _FakeQuantize(torch.autograd.Function):
    """For the lambda warm-up, which multiplies in floating point."""

    @staticmethod
    def forward(ctx: Any, op: Any, options: Any, w: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        output = below(op, w, parameters, *options)
        _, t, w_scale = output
        kept = _keep(ctx, WeightOptions(*options), w, parameters)
        ctx.save_for_backward(keep(t, latent.record_of(ctx.options), torch.ops.qat.pack_bits), w_scale, *kept)
        ctx.mark_non_differentiable(t, w_scale)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (3 + ctx.count)
        grad_weight, rest = _through(ctx, grad, ctx.saved_tensors)
        return None, None, grad_weight.to(grad.dtype), *rest


class _PackedLinear(torch.autograd.Function):
    """For adapters trained on top: gradients of the input and the bias; packed codes and their scale are frozen."""

    @staticmethod
    def forward(ctx: Any, op: Any, options: Any, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.options = PackedOptions(*options)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(packed, scale)
        return below(op, x, packed, scale, bias, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, scale = ctx.saved_tensors
        _, _, needs_x, _, _, needs_bias = ctx.needs_input_grad
        grad_x = grad_bias = None
        if needs_x:
            k, layout = ctx.options.in_features, ctx.options.layout
            codes = packed if layout == LAYOUT else packing.decode(packed, k, layout)
            grad_x = _input_gradient(grad, Kept(codes, k), scale)
        if needs_bias:
            grad_bias = bias_gradient(grad).to(ctx.bias_dtype)
        return None, None, grad_x, None, None, grad_bias


# name -> function, number of tensors before the op's options (or before a list of parameters), whether there is such a list
GRADIENTS: dict[str, tuple[type[torch.autograd.Function], int, bool]] = {
    "bitlinear": (BitLinear, 3, True),
    "fake_quantize": (_FakeQuantize, 1, True),
    "packed_linear": (_PackedLinear, 4, False),
}


def with_gradient(op: Any, function: type[torch.autograd.Function], count: int, listed: bool) -> Callable[..., Any]:
    """What the op does where autograd is: record `function` if one of its tensors needs a gradient."""

    def call(*arguments: Any) -> Any:
        tensors = (*arguments[:count], *arguments[count]) if listed else arguments[:count]
        if torch.is_grad_enabled() and any([value is not None and value.requires_grad for value in tensors]):
            return function.apply(op, arguments[count + listed :], *tensors)  # type: ignore[no-untyped-call]
        return below(op, *arguments)

    return call
