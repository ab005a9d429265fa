"""The CUDA kernels, run on the CPU by csrc/emulation, give the reference's integers, and its floats to the bit.

Nothing here needs a GPU or nvcc. Threads run in three extreme orders, and memory is guarded; test_cuda_barriers.py shows that
the emulation would notice a missing barrier.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint64

import pytest
import torch
from emulator import (
    REDUCES,
    TILES,
    Emulator,
    Linear,
    Output,
    PackedLinear,
    QuantizeWeight,
    expected_linear,
    linear,
    output,
    packed_linear,
    problem,
    quantize_activation,
    quantize_weight,
)
from kernel_checks import DTYPES, EPS, LAYOUTS, same, tokens

from qat.quantizers import activations, latent, packing
from qat.quantizers.record import WeightOptions

# K around 16 bytes, the loads a warp or a block keeps, and beyond them
ACTIVATIONS = [(1, 1), (9, 5), (3, 64), (2, 72), (17, 576), (2, 2560), (2, 4100), (1, 6912), (1, 16500)]


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_activation(gpu: Emulator, dtype: torch.dtype, per_tensor: bool) -> None:
    for i, (m, k) in enumerate(ACTIVATIONS):
        gpu.order, gpu.at_end = i % 3, i % 2 == 0
        x = tokens(m, k, dtype)
        codes, divisor, scale = quantize_activation(gpu, x, per_tensor)
        expected, expected_divisor = activations.activation_codes(x, "tensor" if per_tensor else "token", EPS)
        same(codes, expected)
        same(divisor, expected_divisor.contiguous())
        same(scale, 1 / expected_divisor)


def alike(a: torch.Tensor, b: torch.Tensor) -> None:
    """The same bits, but that any NaN is like any other."""
    same(a.isnan(), b.isnan())
    same(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [5, 80, 128, 3000, 16500])
def test_nan_and_inf_stay_in_their_token(gpu: Emulator, k: int, dtype: torch.dtype, value: float) -> None:
    x = torch.randn(3, k).to(dtype)
    x[1, k - 2] = value
    for per_tensor in (False, True):
        codes, divisor, scale = quantize_activation(gpu, x, per_tensor)
        expected, expected_divisor = activations.activation_codes(x, "tensor" if per_tensor else "token", EPS)
        assert per_tensor or divisor.gt(0).flatten().tolist() == [True, False, True]
        same(codes, expected)
        alike(divisor, expected_divisor.contiguous())
        alike(scale, 1 / expected_divisor)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(1, 40, 256, 1), (3, 40, 256, 1), (3, 20, 90, 1), (1, 20, 256, 2), (18, 20, 64, 1)], ids=str)
def test_linear_of_nan_and_inf(gpu: Emulator, shape: tuple[int, int, int, int], value: float) -> None:
    for dtype in DTYPES:
        p = problem(*shape, dtype=dtype)
        p.x[-1, 7] = value
        alike(packed_linear(gpu, p), expected_linear(p))
        alike(linear(gpu, p), expected_linear(p))


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("k", [72, 4000, 16500])
def test_norm_in_front(gpu: Emulator, k: int, per_tensor: bool) -> None:
    x, weight = torch.randn(3, k).bfloat16(), (1 + torch.randn(k) / 8).bfloat16()
    codes, divisor, _ = quantize_activation(gpu, x, per_tensor, weight)
    normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    expected, expected_divisor = activations.activation_codes(
        weight * normal.bfloat16(), "tensor" if per_tensor else "token", EPS
    )
    # the sum of squares has another order than torch's: a product may round to the next bfloat16
    assert (codes.int() - expected.int()).abs().max() <= 1
    assert (codes != expected).float().mean() < 0.01
    torch.testing.assert_close(divisor, expected_divisor.contiguous(), rtol=2**-7, atol=0)


WEIGHTS = [("tensor", 7, 5, 1), ("tensor", 3, 2000, 1), ("tensor", 40, 64, 1), ("channel", 9, 5, 1), ("channel", 3, 256, 1)]
WEIGHTS += [("channel", 2, 1500, 1), ("channel", 2, 4096, 1), ("channel", 1, 33000, 1), ("group", 5, 20, 4), ("group", 4, 12, 2)]
WEIGHTS += [("group", 3, 256, 4), ("group", 2, 1024, 8), ("group", 3, 96, 3)]


@pytest.mark.parametrize("scheme", ["ternary", "binary"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", REDUCES)
def test_quantize_weight(gpu: Emulator, reduce: str, dtype: torch.dtype, scheme: str) -> None:
    for i, (granularity, n, k, groups) in enumerate(WEIGHTS):
        gpu.order, gpu.at_end = i % 3, i % 2 == 0
        w = (torch.randn(n, k) / 30 + 0.003).to(dtype)
        scale_dtype = i % 3
        found = quantize_weight(gpu, w, scheme, reduce, granularity, groups, scale_dtype)
        names = ("float32", "bfloat16", "float16")
        group = k // groups if granularity == "group" else None
        options = WeightOptions(scheme, reduce, granularity, group, 1, "fitted", names[scale_dtype], EPS, 1.0)
        rows, expected, shape = latent.weight_scale(w, options)
        same(found.scale, expected.reshape(shape))
        scale = found.scale.reshape(-1, 1)
        mean = rows.double().mean(-1, keepdim=True).float()
        codes = (rows / scale).round().clamp(-1, 1) if scheme == "ternary" else torch.where(rows > mean, 1.0, -1.0)
        same(found.t, codes.to(torch.int8).reshape(n, k))
        same(found.packed, packing.pack_ternary(found.t, "2bit"))


def test_weight_codes_at_the_limit(gpu: Emulator) -> None:
    """Around |w| = scale / 2 the comparison gives what the division and the rounding give."""
    scale = torch.rand(64, 1) + 0.1
    half = scale / 2
    near = [half, half.nextafter(torch.tensor(1.0)), half.nextafter(torch.tensor(0.0)), 3 * half, scale, 0 * half]
    w = torch.cat([*near, *(-value for value in near)], 1)
    t, read_t = gpu.empty(*w.shape, dtype=torch.int8)
    arguments = (*w.shape, 1, 1, 2, False, 0, EPS, t, None, gpu.put(scale), None)
    gpu.run("run_quantize_weight", QuantizeWeight(gpu.put(w), 0, *arguments))
    same(read_t(), (w / scale).round().clamp(-1, 1).to(torch.int8))


CODES = [(1, 1), (3, 5), (7, 16), (9, 64), (5, 83), (2, 320), (4, 30)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_and_unpack(gpu: Emulator, layout: str) -> None:
    for i, (n, k) in enumerate(CODES):
        gpu.at_end = i % 2 == 0
        t = torch.randint(-1, 2, (n, k), dtype=torch.int8)
        packed, expected = packing.pack_ternary(t, layout), packing.pack_ternary(t, "2bit")
        bad = gpu.put(torch.tensor([-1]))
        out, read = gpu.empty(*packed.shape, dtype=torch.uint8)
        gpu.run("run_pack", gpu.put(t), n, k, LAYOUTS.index(layout), out, bad)
        same(read(), packed)
        out, read = gpu.empty(n, k, dtype=torch.int8)
        gpu.run("run_unpack", gpu.put(packed), n, k, LAYOUTS.index(layout), out, bad)
        same(read(), t)
        if layout == "base3":
            out, read = gpu.empty(*expected.shape, dtype=torch.uint8)
            gpu.run("run_repack", gpu.put(packed), n, k, out, bad)
            same(read(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [64, 83])
def test_first_bad_code_is_found(gpu: Emulator, k: int, layout: str) -> None:
    t = torch.randint(-1, 2, (5, k), dtype=torch.int8)
    packed = packing.pack_ternary(t, layout)
    t.view(-1)[[77, 131, 200]] = torch.tensor([2, -2, 127], dtype=torch.int8)
    bad = c_uint64(2**64 - 1)
    out, _ = gpu.empty(*packed.shape, dtype=torch.uint8)
    gpu.run("run_pack", gpu.put(t), 5, k, LAYOUTS.index(layout), out, ctypes.addressof(bad))
    assert bad.value == 77
    packed.view(-1)[[31, 40]] = 255
    for name, size in [("run_unpack", k), *([("run_repack", -(-k // 4))] if layout == "base3" else [])]:
        bad = c_uint64(2**64 - 1)
        out, _ = gpu.empty(5, size, dtype=torch.uint8)
        arguments = [LAYOUTS.index(layout), out] if name == "run_unpack" else [out]
        gpu.run(name, gpu.put(packed), 5, k, *arguments, ctypes.addressof(bad))
        assert bad.value == 31


# M, N, K, groups: K = 63 has whole 16-byte rows all the same; N around 16 rows; 5, 30 and 100 take the narrow loads
SHAPES = [(1, 1, 1, 1), (1, 40, 64, 1), (1, 33, 63, 1), (1, 17, 576, 1), (1, 130, 1344, 1), (7, 20, 5, 1), (3, 18, 100, 1)]
SHAPES += [(16, 50, 320, 1)]
SHAPES += [(8, 35, 2560, 1), (9, 16, 128, 1), (1, 20, 256, 4), (16, 37, 384, 3), (5, 18, 100, 5), (7, 9, 30, 2), (17, 66, 128, 1)]
SHAPES += [(17, 20, 130, 1), (130, 70, 192, 1), (65, 40, 256, 2), (20, 33, 90, 3)]


@pytest.mark.parametrize("scales", ["row", "one"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_linear(gpu: Emulator, shape: tuple[int, int, int, int], scales: str) -> None:
    i = SHAPES.index(shape) + (scales == "one")
    gpu.order, gpu.at_end = i % 3, i % 2 == 0
    granularity = "tensor" if i % 4 == 3 else "token"
    p = problem(*shape, scales=scales, dtype=DTYPES[i % 3], bias=i % 5 != 0)
    same(packed_linear(gpu, p, granularity == "tensor"), expected_linear(p, granularity))


@pytest.mark.parametrize("tile", TILES[:3])
@pytest.mark.parametrize("shape", [(130, 270, 320, 1), (66, 140, 256, 2), (3, 31, 75, 3)], ids=str)
def test_packed_linear_of_many_tokens(gpu: Emulator, shape: tuple[int, int, int, int], tile: str) -> None:
    gpu.order = TILES.index(tile)
    p = problem(*shape, dtype=DTYPES[TILES.index(tile)])
    same(packed_linear(gpu, p, tile=tile), expected_linear(p))


@pytest.mark.parametrize("tile", [None, *TILES[:3]])
@pytest.mark.parametrize("shape", [(130, 270, 320, 1), (1, 1, 1, 1), (7, 33, 75, 3), (70, 40, 256, 4), (40, 150, 61, 1)], ids=str)
def test_training_forward(gpu: Emulator, shape: tuple[int, int, int, int], tile: str | None) -> None:
    gpu.order = (shape[0] + len(tile or "")) % 3
    p = problem(*shape, dtype=DTYPES[gpu.order])
    same(linear(gpu, p, tile), expected_linear(p))


@pytest.mark.parametrize("tile", TILES)
def test_integers_before_rescaling(gpu: Emulator, tile: str) -> None:
    p = problem(37, 75, 160)
    codes, _ = activations.activation_codes(p.x, "token", EPS)
    same(linear(gpu, p, tile, raw=True), codes.int() @ p.t.int().t())


@pytest.mark.parametrize("shape", [(300, 200, 832, 1), (1, 130, 64, 1), (260, 33, 576, 1)], ids=str)
def test_hopper_products(gpu: Emulator, shape: tuple[int, int, int, int]) -> None:
    gpu.order = shape[0] % 3
    for scales, bias, dtype in [("row", True, torch.bfloat16), ("one", False, torch.float32)]:
        p = problem(*shape, scales=scales, dtype=dtype, bias=bias)
        same(packed_linear(gpu, p, tile="hopper"), expected_linear(p))
        same(linear(gpu, p, "hopper"), expected_linear(p))


def hard_quotients() -> tuple[list[int], list[int]]:
    """Integers a and b of 24 bits whose quotients lie as near as can be to the middle between two floats."""
    dividends, divisors = [], []
    for b in (torch.randint(2**22, 2**23, (4000,), generator=torch.Generator().manual_seed(0)) * 2 + 1).tolist():
        for k in (24, 25):
            inverse = pow(pow(2, k, b), -1, b)
            for a, rest in ((inverse, 1), (b - inverse, -1)):  # a * 2^k = b * middle + rest
                middle = (a * 2**k - rest) // b
                if 2**24 <= middle < 2**25 and middle % 2:
                    dividends.append(a)
                    divisors.append(b)
    return dividends, divisors


@pytest.mark.parametrize("units", range(-2, 3))
def test_a_quotient_without_checks_is_the_quotient(gpu: Emulator, units: int) -> None:
    """Whatever the last bits of the first reciprocal, which a GPU and the emulation have different."""
    generator = torch.Generator().manual_seed(units + 2)
    a = torch.randint(-(2**25), 2**25, (200_000,), generator=generator).float()
    b = torch.rand(200_000, generator=generator).add(1).mul(2.0 ** torch.randint(-99, 99, (200_000,), generator=generator))
    hard = hard_quotients()
    assert len(hard[0]) > 2000
    a, b = torch.cat([a, torch.tensor(hard[0]).float()]), torch.cat([b, torch.tensor(hard[1]).float()])
    out, read = gpu.empty(len(a))
    gpu.run("run_divide_plain", gpu.put(a), gpu.put(b), len(a), units, out)
    same(read(), a / b)


@pytest.mark.parametrize("tile", [*TILES])
def test_scales_at_the_ends_of_the_exponents(gpu: Emulator, tile: str) -> None:
    """A quotient without checks would be wrong there, so it is not taken; beside scales for which it is."""
    p = problem(33, 80, 128, dtype=torch.float32)
    p.scale[::16] = torch.tensor([1e-38, 1e30, 1e-20, 1e38, 0.02]).reshape(5, 1)
    p.x[5], p.x[6] = 1e-30, 1e30 * p.x[6]
    for found in (packed_linear(gpu, p, tile=tile), linear(gpu, p, tile)):
        alike(found, expected_linear(p))


def test_wrong_arguments_are_refused(gpu: Emulator) -> None:
    p = problem(2, 4, 64)
    with pytest.raises(AssertionError, match="error 1"):
        gpu.run("run_linear", Linear(None, None, None, 2, 4, 64, 3, Output(), False, None))
    call = PackedLinear(gpu.put(p.x), False, EPS, gpu.put(p.packed), 2, 4, 64, 1, output(gpu, p)[0], *[None] * 4, False)
    with pytest.raises(AssertionError, match="error 1"):
        gpu.run("run_packed_linear", call)
