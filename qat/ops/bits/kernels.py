"""The bits of codes, and the floats that codes stand for, by compiled kernels, where a device has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat.ops import cpu, cuda
from qat.ops import reference as plain
from qat.ops.bits import reference
from qat.ops.operands import DTYPES
from qat.ops.options import TrainingOptions


def _cpu_pack(t: Tensor) -> Tensor:
    if t.numel() == 0 or not cpu.compiled():
        return reference.pack_bits(t)
    return torch.ops.qat.cpu_pack_bits(t.contiguous())


def _cpu_unpack(bits: Tensor, k: int) -> Tensor:
    if bits.numel() == 0 or not cpu.compiled():
        return reference.unpack_bits(bits, k)
    return torch.ops.qat.cpu_unpack_bits(bits.contiguous(), k)


def _cpu_dequantize(bits: Tensor, k: int, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype not in DTYPES or bits.numel() == 0 or not cpu.compiled():
        return reference.dequantize_bits(bits, k, scale, dtype)
    return torch.ops.qat.cpu_dequantize_bits(bits.contiguous(), k, scale.contiguous(), DTYPES.index(dtype))


def _cpu_coded_bitlinear(
    x: Tensor, codes: Tensor, w_scale: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.coded_bitlinear`. Tiles are made anew: codes that are gathered are written where others were."""
    o = TrainingOptions(*options)
    (n, k), groups = (codes.shape[0], x.shape[-1] * o.planes), w_scale.shape[1]
    if o.act_bits is None or codes.dtype == torch.int8 or codes.numel() == 0 or not cpu._serves(x, k):
        return plain.coded_bitlinear(x, codes, w_scale, bias, *options, unpack=torch.ops.qat.unpack_bits)
    tiles = torch.ops.qat.cpu_tile(codes.contiguous(), k, groups, False, False)
    return cpu.multiply(x, tiles, cpu._tile_scale(w_scale, n), bias, (n, k, groups), o)


def _unlooked(tensor: Tensor) -> Tensor:
    """Where the kernels would write of a bad value: never read, so nothing waits for the device."""
    return tensor.new_empty(1, dtype=torch.int64)


def _cuda_pack(t: Tensor) -> Tensor:
    if t.numel() == 0 or not cuda._serves(t):
        return reference.pack_bits(t)
    return torch.ops.qat.cuda_pack(t.contiguous(), False, _unlooked(t))


def _cuda_unpack(bits: Tensor, k: int) -> Tensor:
    if bits.numel() == 0 or not cuda._serves(bits):
        return reference.unpack_bits(bits, k)
    return torch.ops.qat.cuda_unpack(bits.contiguous(), k, False, _unlooked(bits))


def _cuda_dequantize(bits: Tensor, k: int, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype not in DTYPES or bits.numel() == 0 or not cuda._serves(bits):
        return reference.dequantize_bits(bits, k, scale, dtype)
    return torch.ops.qat.cuda_dequantize_bits(bits.contiguous(), k, scale.contiguous(), dtype)


def _cuda_floats(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See `reference.dequantize` of `qat.ops`."""
    if dtype not in DTYPES or codes.numel() == 0 or not cuda._serves(codes):
        return plain.dequantize(codes, scale, dtype)
    groups = scale.shape[-1]
    rows = scale.expand(*codes.shape[:-1], groups) if scale.numel() > groups else scale
    flat = codes.contiguous().view(-1, codes.shape[-1])
    return torch.ops.qat.cuda_dequantize_codes(flat, rows.reshape(-1, groups).contiguous(), dtype).view(codes.shape)


CPU: dict[str, Callable[..., Any]] = {
    "pack_bits": _cpu_pack,
    "unpack_bits": _cpu_unpack,
    "dequantize_bits": _cpu_dequantize,
    "coded_bitlinear": _cpu_coded_bitlinear,
}
CUDA: dict[str, Callable[..., Any]] = {
    "pack_bits": _cuda_pack,
    "unpack_bits": _cuda_unpack,
    "dequantize_bits": _cuda_dequantize,
    "dequantize": _cuda_floats,
}
