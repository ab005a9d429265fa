"""The backward passes of soft codes: matmuls on what was multiplied, then the slope dQ/dw, weight by weight.

Of the weight only Q and its slope are kept. `quant.backward` holds here as it does for codes: `bf16` rounds what enters the two
matmuls to bfloat16, the activations' codes not at all. int8 has no codes of a weight to multiply by, so it is bf16 here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.ops import cpu
from qat.ops.gradients import below, bias_gradient, input_weight_gradient, weight_gradient
from qat.ops.options import TrainingOptions, WeightOptions
from qat.quantizers import soft
from qat.quantizers.latent import record_of

Gradients = tuple[Tensor | None, Tensor | None]
"""Of x and of the soft weight, where they are needed."""


def _as_it_comes(grad: Tensor, weight: Tensor, x: Tensor, x_scale: Tensor, needs: Sequence[bool]) -> Gradients:
    grad_x = grad @ weight.to(grad.dtype) if needs[0] else None
    return grad_x, input_weight_gradient(grad, x, x_scale, weight.dtype) if needs[1] else None


def _bf16(grad: Tensor, weight: Tensor, x: Tensor, x_scale: Tensor, needs: Sequence[bool]) -> Gradients:
    """The codes of x are exact in bfloat16; their scales are the gradient's rows', which is read once for both matmuls."""
    plain, scaled = _halves(grad, x_scale)
    grad_x = plain @ weight.bfloat16() if needs[0] else None
    return grad_x, weight_gradient(scaled, x.bfloat16(), weight.dtype) if needs[1] else None


def _halves(grad: Tensor, x_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(grad, grad * x_scale) in bfloat16."""
    if not (grad.is_cpu and grad.dtype == torch.float32 and grad.numel() > 0 and cpu.compiled()):
        return grad.bfloat16(), (grad * x_scale).bfloat16()
    rows = grad.reshape(-1, grad.shape[-1]).contiguous()
    plain, scaled = torch.ops.qat.cpu_scaled_bf16(rows, x_scale.reshape(-1, 1).contiguous())
    return plain.view(grad.shape), scaled.view(grad.shape)


_MATMULS = {"input": _as_it_comes, "bf16": _bf16, "int8": _bf16}


def _keep(o: WeightOptions, w: Tensor, beta: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor]:
    """What the gradients of parameters need: nothing where none are trained."""
    return [w, beta, *parameters] if any(one.trained for one in record_of(o).parameters.values()) else []


def _through(ctx: Any, grad: Tensor, slope: Tensor, kept: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of the latent weight and of the quantizer's parameters, from that of the soft weight, which is overwritten.

    A new matrix takes longer to come by than to fill, and torch is slow with two dtypes at once.
    """
    rest: list[Tensor | None] = [None] * ctx.count
    if kept:
        w, beta, *parameters = kept
        rest = soft.parameter_gradients(grad, w, beta, parameters, ctx.options)
    return grad.to(slope.dtype).mul_(slope), rest


class SoftBitLinear(torch.autograd.Function):
    """Gradients of the input, the latent weight, the bias and the quantizer's parameters."""

    @staticmethod
    def forward(
        ctx: Any, op: Any, options: Any, x: Tensor, w: Tensor, bias: Tensor | None, beta: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        output = below(op, x, w, bias, beta, parameters, *options)
        _, x_q, x_scale, weight, slope = output
        o = TrainingOptions(*options)
        ctx.matmuls, ctx.options, ctx.count = _MATMULS[o.backward], o, len(parameters)
        ctx.dtypes = x.dtype, w.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x if o.act_bits is None else x_q, x_scale, weight, slope, *_keep(o, w, beta, parameters))
        ctx.mark_non_differentiable(x_q, x_scale, weight, slope)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (6 + ctx.count)
        x, x_scale, weight, slope, *kept = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        _, _, needs_x, needs_weight, needs_bias, _, *needs_parameters = ctx.needs_input_grad
        needs = needs_x, needs_weight or any(needs_parameters)
        grad_x, grad_soft = ctx.matmuls(grad, weight, x, x_scale, needs)
        grad_x = None if grad_x is None else grad_x.to(x_dtype)
        grad_weight: Tensor | None = None
        rest: list[Tensor | None] = [None] * ctx.count
        if grad_soft is not None:
            grad_latent, rest = _through(ctx, grad_soft, slope, kept)
            grad_weight = grad_latent.to(weight_dtype)
        grad_bias = bias_gradient(grad).to(bias_dtype) if needs_bias else None
        return None, None, grad_x, grad_weight, grad_bias, None, *rest


class SoftQuantize(torch.autograd.Function):
    """For the lambda warm-up, which blends the soft weight in."""

    @staticmethod
    def forward(ctx: Any, op: Any, options: Any, w: Tensor, beta: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        output = below(op, w, beta, parameters, *options)
        ctx.options, ctx.count, ctx.dtype = WeightOptions(*options[1:]), len(parameters), w.dtype
        ctx.save_for_backward(output[1], *_keep(ctx.options, w, beta, parameters))
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (4 + ctx.count)
        slope, *kept = ctx.saved_tensors
        grad_weight, rest = _through(ctx, grad.clone(), slope, kept)
        return None, None, grad_weight.to(ctx.dtype), None, *rest


# as `qat.ops.gradients.GRADIENTS`
GRADIENTS: dict[str, tuple[type[torch.autograd.Function], int, bool]] = {
    "soft_bitlinear": (SoftBitLinear, 4, True),
    "soft_quantize": (SoftQuantize, 2, True),
}
