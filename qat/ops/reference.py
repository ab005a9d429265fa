"""The ops in pure torch: what every compiled kernel must equal, and what runs where there is none.

Training (`bitlinear`) and inference (`packed_linear`) share `integer_linear`, so both give the same bits:
the integer sum is exact in float32 (|x_q| <= 128, so K <= 131072), and the rescaling is acc / (s_x * (1 / s_w)), operation
by operation what stock transformers computes from an exported folder, so that the deployed model gives these bits too.

Legend: N out_features, K in_features, G groups along K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.ops.bits.kept import keep
from qat.ops.options import PackedOptions, TrainingOptions, WeightOptions, weight_options
from qat.quantizers import activations, components, latent, packing
from qat.quantizers.scales import dequantize_weight

EXACT_FLOAT32_WIDTH = 2**24 // 128
"""Codes a row whose products with int8 sum up exactly in float32, where a code is -1, 0 or 1."""


def integer_linear(
    x: Tensor,
    divisor: Tensor | None,
    t: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    largest: int = 1,
    multiply: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """(x @ t^T) / divisor * w_scale + bias in `dtype`: bias after rescaling, as every deployed format has it.

    x [..., K] holds int8 codes with x ~ codes / divisor (or floats, with divisor None), t int8 [N, K], w_scale [1 | N, 1 | G].
    No code of t is beyond `largest`. `multiply` gives the exact products of int8 x and t in float32, if not this does.
    """
    if multiply is None:
        compute = torch.float32 if t.shape[1] * largest <= EXACT_FLOAT32_WIDTH else torch.float64
        x, t = x.to(compute), t.to(compute)
    with torch.autocast(x.device.type, enabled=False):
        y = _scaled_matmul(x, divisor, t, w_scale, multiply or F.linear)
    return (y if bias is None else y + bias.float()).to(dtype)


def _scaled_matmul(
    x: Tensor, divisor: Tensor | None, codes: Tensor, w_scale: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    (n, k), groups = codes.shape, w_scale.shape[1]
    if groups <= 1:
        y, scale = multiply(x, codes).float(), w_scale.reshape(-1)
        return y * scale if divisor is None else y / (divisor * (1 / scale))
    x_groups, t_groups = x.unflatten(-1, (groups, k // groups)), codes.unflatten(-1, (groups, k // groups))
    y = torch.zeros(*x.shape[:-1], n, dtype=torch.float32, device=x.device)
    for g in range(groups):
        y += multiply(x_groups[..., g, :], t_groups[:, g]).float() * w_scale[:, g]
    return y if divisor is None else y / divisor


def _decode(bits: Tensor, k: int) -> Tensor:
    return packing.decode(bits, k, "2bit")


def quantize_activation(x: Tensor, granularity: str, eps: float) -> tuple[Tensor, Tensor]:
    """See `qat.ops.quantize_activation`."""
    return activations.quantize_activation(x, granularity, eps)


def quantize_weight(w: Tensor, parameters: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    """See `qat.ops.quantize_weight`; `options` are WeightOptions."""
    return latent.quantize_weight(w, WeightOptions(*options), parameters)


def fake_quantize(
    w: Tensor, parameters: Sequence[Tensor], *options: Any, quantize: Callable[..., Any] = quantize_weight
) -> tuple[Tensor, Tensor, Tensor]:
    """(the quantized weight [N, K] in w's dtype, t, w_scale): `options` are WeightOptions, `quantize` a device's."""
    t, w_scale = quantize(w, parameters, *options)
    value = components.sum_components(dequantize_weight(t, w_scale), WeightOptions(*options).planes)
    return value.to(w.dtype), t, w_scale


def packed_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """See `qat.ops.packed_linear`; `options` are PackedOptions."""
    o = PackedOptions(*options)
    t = packing.decode(packed, o.in_features, o.layout)
    if o.act_bits is None:
        return integer_linear(x, None, t, scale, bias, x.dtype)
    x_q, divisor = activations.activation_codes(x, o.act_granularity, o.eps)
    return integer_linear(x_q, divisor, t, scale, bias, x.dtype)


def bitlinear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    parameters: Sequence[Tensor],
    *options: Any,
    pack: Callable[[Tensor], Tensor] = packing.encode,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, x_q, x_scale, codes, w_scale): the output and what the backward pass needs: a byte an input, 2 bits a weight.

    `options` are TrainingOptions, `pack` a device's. With act_bits None, x_q and x_scale are empty and the backward pass reads
    x itself. The weight's codes are as `qat.ops.bits.kept` keeps them.
    """
    o = TrainingOptions(*options)
    t, w_scale = quantize_weight(w, parameters, *weight_options(o))
    return *_of_codes(x, t, w_scale, bias, o), keep(t, latent.record_of(o), pack), w_scale


def _of_codes(x: Tensor, t: Tensor, w_scale: Tensor, bias: Tensor | None, o: TrainingOptions) -> tuple[Tensor, Tensor, Tensor]:
    largest = max(map(abs, latent.record_of(o).levels))
    if o.act_bits is None:
        y, empty = integer_linear(components.repeat(x, o.planes), None, t, w_scale, bias, x.dtype, largest), x.new_empty(0)
        return y, empty.to(torch.int8), empty.float()
    x_q, divisor = activations.activation_codes(x, o.act_granularity, o.eps)
    y = integer_linear(components.repeat(x_q, o.planes), divisor, t, w_scale, bias, x.dtype, largest)
    return y, x_q, (1 / divisor).contiguous()


def coded_bitlinear(
    x: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    *options: Any,
    unpack: Callable[[Tensor, int], Tensor] = _decode,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first three results of `bitlinear`, of a weight that is codes, as they are kept, and scales already."""
    o = TrainingOptions(*options)
    t = codes if codes.dtype == torch.int8 else unpack(codes, x.shape[-1] * o.planes)
    return _of_codes(x, t, w_scale, bias, o)


def quantized_matmul(x: Tensor, t: Tensor, eps: float) -> Tensor:
    """x @ t for x [M, N], quantized to int8 by rows, and codes t [N, K]: the backward pass of `backward=int8`."""
    codes, divisor = activations.activation_codes(x, "token", eps)
    return integer_linear(codes, divisor, t.t(), x.new_ones(1, 1, dtype=torch.float32), None, x.dtype)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale in float32, rounded to `dtype`: codes int8 [..., K], scale [..., G] with every size 1 or that of codes."""
    if codes.numel() == 0:
        return torch.empty_like(codes, dtype=dtype)
    rows = codes.unflatten(-1, (scale.shape[-1], -1))
    values = torch.empty(rows.shape, dtype=dtype, device=codes.device)
    return torch.mul(rows, scale[..., None], out=values).reshape(codes.shape)  # one pass over the memory of a GPU


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in int32 for int8 matrices [M, K] and [K, N], exact: the weight's gradient of `backward=int8`."""
    if a.is_cpu:
        return torch._int_mm(a, b)
    return (a.double() @ b.double()).to(torch.int32)  # CUDA's _int_mm refuses most shapes
