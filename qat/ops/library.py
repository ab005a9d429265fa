"""The ops as torch.library knows them: schema, reference implementation, fake (shapes), autograd.

Every op exists twice. `qat::NAME` takes compiled kernels where a device has them (`cpu` and `cuda` decide, at the
first call); `qat::NAME_reference` is pure torch on every device: what `kernels=reference` calls.
`gradients` holds the backward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat.ops import cpu, cuda, reference
from qat.ops.bits import kernels as bits_kernels
from qat.ops.bits import reference as bits
from qat.ops.bits.kept import keep
from qat.ops.build.caches import keep_apart
from qat.ops.gradients import GRADIENTS, with_gradient
from qat.ops.options import PackedOptions, TrainingOptions, WeightOptions, schema, weight_options
from qat.ops.soft import kernels as soft_kernels
from qat.ops.soft import reference as soft_reference
from qat.ops.soft.gradients import GRADIENTS as SOFT_GRADIENTS
from qat.quantizers import packing
from qat.quantizers.latent import record_of
from qat.quantizers.scales import scale_shape

_LIBRARY = torch.library.Library("qat", "DEF")


def _fake_quantize_activation(x: Tensor, granularity: str, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _fake_quantize_weight(w: Tensor, parameters: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    o = WeightOptions(*options)
    n, k = w.shape
    shape = scale_shape(n, k, o.granularity, o.group_size, o.planes)
    return w.new_empty((n, k * o.planes), dtype=torch.int8), w.new_empty(shape, dtype=torch.float32)


def _fake_pack_bits(t: Tensor) -> Tensor:
    return t.new_empty((t.shape[0], -(-t.shape[1] // 4)), dtype=torch.uint8)


def _fake_unpack_bits(bits: Tensor, k: int) -> Tensor:
    return bits.new_empty((bits.shape[0], k), dtype=torch.int8)


def _fake_dequantize_bits(bits: Tensor, k: int, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.new_empty((bits.shape[0], k), dtype=dtype)


def _fake_fake_quantize(w: Tensor, parameters: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(w), *_fake_quantize_weight(w, parameters, *options)


def _fake_pack_ternary(t: Tensor, layout: str) -> Tensor:
    return t.new_empty((t.shape[0], packing.get_layout(layout).row_bytes(t.shape[1])), dtype=torch.uint8)


def _fake_unpack_ternary(packed: Tensor, k: int, layout: str) -> Tensor:
    return packed.new_empty((packed.shape[0], k), dtype=torch.int8)


def _fake_packed_linear(x: Tensor, packed: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _fake_bitlinear(x: Tensor, w: Tensor, bias: Tensor | None, parameters: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
    o = TrainingOptions(*options)
    y = x.new_empty((*x.shape[:-1], w.shape[0]))
    x_q, x_scale = _fake_quantize_activation(x, o.act_granularity, o.eps)
    if o.act_bits is None:
        x_q, x_scale = x_q.new_empty(0), x_scale.new_empty(0)
    t, w_scale = _fake_quantize_weight(w, parameters, *weight_options(o))
    return y, x_q, x_scale, keep(t, record_of(o), _fake_pack_bits), w_scale


def _fake_coded_bitlinear(x: Tensor, codes: Tensor, w_scale: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    o = TrainingOptions(*options)
    y = x.new_empty((*x.shape[:-1], codes.shape[0]))
    if o.act_bits is None:
        return y, x.new_empty(0, dtype=torch.int8), x.new_empty(0, dtype=torch.float32)
    return y, *_fake_quantize_activation(x, o.act_granularity, o.eps)


def _fake_soft_quantize(
    w: Tensor, beta: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype, *_: Any
) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape, dtype=dtype), w.new_empty(w.shape, dtype=dtype)


def _fake_soft_bitlinear(
    x: Tensor, w: Tensor, bias: Tensor | None, beta: Tensor, parameters: Sequence[Tensor], *options: Any
) -> tuple[Tensor, ...]:
    plain = _fake_bitlinear(x, w, bias, parameters, *options)
    return *plain[:3], *_fake_soft_quantize(w, beta, parameters, x.dtype)


def _fake_quantized_matmul(x: Tensor, t: Tensor, eps: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], t.shape[1]))


def _fake_dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _fake_int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32)


# name -> arguments and results, reference, fake
_OPS: dict[str, tuple[str, Any, Any]] = {
    "quantize_activation": (
        "(Tensor x, str granularity, float eps) -> (Tensor, Tensor)",
        reference.quantize_activation,
        _fake_quantize_activation,
    ),
    "quantize_weight": (
        f"(Tensor w, Tensor[] parameters, {schema(WeightOptions)}) -> (Tensor, Tensor)",
        reference.quantize_weight,
        _fake_quantize_weight,
    ),
    "fake_quantize": (
        f"(Tensor w, Tensor[] parameters, {schema(WeightOptions)}) -> (Tensor, Tensor, Tensor)",
        reference.fake_quantize,
        _fake_fake_quantize,
    ),
    "pack_ternary": ("(Tensor t, str layout) -> Tensor", packing.pack_ternary, _fake_pack_ternary),
    "unpack_ternary": ("(Tensor packed, int k, str layout) -> Tensor", packing.unpack_ternary, _fake_unpack_ternary),
    "packed_linear": (
        f"(Tensor x, Tensor packed, Tensor scale, Tensor? bias, {schema(PackedOptions)}) -> Tensor",
        reference.packed_linear,
        _fake_packed_linear,
    ),
    "bitlinear": (
        f"(Tensor x, Tensor w, Tensor? bias, Tensor[] parameters, {schema(TrainingOptions)})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference.bitlinear,
        _fake_bitlinear,
    ),
    "coded_bitlinear": (
        f"(Tensor x, Tensor codes, Tensor w_scale, Tensor? bias, {schema(TrainingOptions)}) -> (Tensor, Tensor, Tensor)",
        reference.coded_bitlinear,
        _fake_coded_bitlinear,
    ),
    "soft_quantize": (
        f"(Tensor w, Tensor beta, Tensor[] parameters, ScalarType dtype, {schema(WeightOptions)}) -> (Tensor, Tensor)",
        soft_reference.soft_quantize,
        _fake_soft_quantize,
    ),
    "soft_bitlinear": (
        f"(Tensor x, Tensor w, Tensor? bias, Tensor beta, Tensor[] parameters, {schema(TrainingOptions)})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        soft_reference.soft_bitlinear,
        _fake_soft_bitlinear,
    ),
    "dequantize": ("(Tensor codes, Tensor scale, ScalarType dtype) -> Tensor", reference.dequantize, _fake_dequantize),
    "pack_bits": ("(Tensor t) -> Tensor", bits.pack_bits, _fake_pack_bits),
    "unpack_bits": ("(Tensor bits, int k) -> Tensor", bits.unpack_bits, _fake_unpack_bits),
    "dequantize_bits": (
        "(Tensor bits, int k, Tensor scale, ScalarType dtype) -> Tensor",
        bits.dequantize_bits,
        _fake_dequantize_bits,
    ),
    "quantized_matmul": (
        "(Tensor x, Tensor t, float eps) -> Tensor",
        reference.quantized_matmul,
        _fake_quantized_matmul,
    ),
    "int8_matmul": ("(Tensor a, Tensor b) -> Tensor", reference.int8_matmul, _fake_int8_matmul),
}

_KERNELS = {
    "CPU": {**cpu.KERNELS, **bits_kernels.CPU, **soft_kernels.CPU},
    "CUDA": {**cuda.KERNELS, **bits_kernels.CUDA, **soft_kernels.CUDA},
}


def _define(name: str, schema: str, fake: Any, implementation: Any) -> None:
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qat::{name}", fake, lib=_LIBRARY)


for _name, (_schema, _reference, _fake) in _OPS.items():
    _define(_name, _schema, _fake, _reference)
    _define(f"{_name}_reference", _schema, _fake, _reference)
    for _key, _kernels in _KERNELS.items():
        if _name in _kernels:
            _LIBRARY.impl(_name, _kernels[_name], _key)
for _name, _gradient in {**GRADIENTS, **SOFT_GRADIENTS}.items():
    for _twin in (_name, f"{_name}_reference"):
        _LIBRARY.impl(_twin, with_gradient(getattr(torch.ops.qat, _twin).default, *_gradient), "Autograd")
keep_apart()
