"""Codes in floats by the CUDA kernel in the emulation, and by its op: equal to the reference to the bit."""

from __future__ import annotations

import pytest
import torch
from emulator import Emulator
from kernel_checks import DTYPES, same
from test_cuda import emulation as emulation
from test_cuda import place as place

from qat.ops import reference
from qat.quantizers import packing

# N, K, groups: whole chunks of 16 bytes, and not; one row; a group of no whole chunk
SHAPES = [(40, 1040, 1), (3, 64, 1), (5, 24, 3), (70, 8, 1), (1, 40, 2), (4, 37, 1), (3, 1, 1), (6, 20, 5), (2, 12, 2)]


def scales(n: int, groups: int, kind: str) -> torch.Tensor:
    return torch.rand(n if kind == "row" else 1, groups) * 0.05 + 1e-3


@pytest.mark.parametrize("kind", ["row", "tensor", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [False, True], ids=["int8", "2 bits"])
def test_equals_the_reference(gpu: Emulator, bits: bool, dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    for i, (n, k, groups) in enumerate(SHAPES):
        gpu.order, gpu.at_end = i % 3, i % 2 == 0
        scale = scales(n, groups, "row" if kind == "odd" else kind)
        if kind == "odd":
            scale[0, 0], scale[-1, -1] = float("nan"), float("inf")
        low, high = (-1, 1) if bits else (-128, 127)
        t = torch.randint(low, high + 1, (n, k), dtype=torch.int8)
        t[0, 0], t[-1, -1] = low, high
        codes = packing.pack_ternary(t, "2bit") if bits else t
        out, read = gpu.empty(n, k, dtype=dtype)
        operands = gpu.put(codes), bits, n, k, groups, gpu.put(scale), groups if scale.shape[0] > 1 else 0
        gpu.run("run_dequantize", *operands, DTYPES.index(dtype), out)
        same(read().nan_to_num(7.0), reference.dequantize(t, scale, dtype).nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_alone(gpu: Emulator, dtype: torch.dtype) -> None:
    t = torch.randint(-1, 2, (5, 48), dtype=torch.int8)
    out, read = gpu.empty(5, 48, dtype=dtype)
    gpu.run("run_dequantize", gpu.put(packing.pack_ternary(t, "2bit")), True, 5, 48, 1, None, 0, DTYPES.index(dtype), out)
    same(read(), t.to(dtype))


def test_wrong_sizes_are_refused(gpu: Emulator) -> None:
    with pytest.raises(AssertionError, match="error 1"):
        gpu.run("run_dequantize", None, True, 5, 48, 5, None, 0, 0, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ops(place, dtype):
    """Also of more dimensions, and of codes in memory as a view has them."""
    device, op = place
    t = torch.randint(-128, 128, (2, 3, 40), dtype=torch.int8, device=device)
    for scale in (torch.rand(2, 3, 1), torch.rand(1, 1, 1), torch.rand(2, 3, 4), torch.rand(1, 1, 4)):
        same(op("dequantize", t, scale.to(device), dtype), reference.dequantize(t, scale.to(device), dtype))
    turned, one = t[0].t(), torch.rand(1, 1, device=device)
    same(op("dequantize", turned, one, dtype), reference.dequantize(turned, one, dtype))
    small = torch.randint(-1, 2, (7, 36), dtype=torch.int8, device=device)
    bits = op("pack_bits", small)
    for scale in (torch.rand(7, 3), torch.rand(1, 1), torch.rand(7, 1)):
        wanted = reference.dequantize(small, scale.to(device), dtype)
        same(op("dequantize_bits", bits, 36, scale.to(device), dtype), wanted)
