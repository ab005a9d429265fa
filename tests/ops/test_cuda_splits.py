"""K split among blocks: which shapes are, by value, and that sums in parts give the bits of sums in one; emulated, no GPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulator import TILES, Emulator, Linear, Output, expected_linear, linear, packed_linear, plan, problem
from kernel_checks import DTYPES, EPS, same, tokens
from test_cuda import emulation as emulation
from test_cuda import place as place

from qat.config import QuantConfig
from qat.ops import reference
from qat.ops.fused import cuda as fused
from qat.ops.options import training_options
from qat.quantizers import activations, packing

# M, N, K, splits: parts of unequal stages, less of them than asked for, rows of 16 bytes and of any length, one token and many
SHAPES = [(1, 33, 1344, 5), (3, 20, 813, 4), (66, 70, 704, 3), (40, 40, 320, 16), (2, 9, 64, 4), (17, 72, 333, 2)]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_have_the_bits_of_the_whole(gpu: Emulator, shape: tuple[int, int, int, int], tile: str) -> None:
    m, n, k, splits = shape
    if tile == "hopper" and k % 64:
        pytest.skip("not served: rows are not whole units of 16 bytes")
    gpu.order, gpu.at_end = SHAPES.index(shape) % 3, m % 2 == 0
    p = problem(m, n, k, dtype=DTYPES[gpu.order], scales="one" if m == 3 else "row", bias=m != 17)
    same(packed_linear(gpu, p, tile=tile, splits=splits), expected_linear(p))
    same(linear(gpu, p, tile, splits=splits), expected_linear(p))
    codes, _ = activations.activation_codes(p.x, "token", EPS)
    same(linear(gpu, p, tile, raw=True, splits=splits), codes.int() @ p.t.int().t())


def test_scales_at_the_ends_of_the_exponents(gpu: Emulator) -> None:
    p = problem(33, 80, 512, dtype=torch.float32)
    p.scale[::16] = torch.tensor([1e-38, 1e30, 1e-20, 1e38, 0.02]).reshape(5, 1)
    p.x[5] = 1e-30
    found, whole = linear(gpu, p, "small", splits=3), linear(gpu, p, "small")
    same(found.isnan(), whole.isnan())
    same(found.nan_to_num(nan=0.0), whole.nan_to_num(nan=0.0))


def test_each_sum_is_written_once_and_read_once(gpu: Emulator) -> None:
    m, n, k, splits = 64, 256, 768, 3
    p = problem(m, n, k)
    with gpu.count():
        same(linear(gpu, p, "small", splits=splits), expected_linear(p))
    assert gpu.counted("global", "split.cu") == (splits * m * n * 4 // 32,) * 2
    operands = (m * k * (n // 64) + n * k) // 32  # by tiles of 64 x 64
    assert gpu.counted("global", "operands.h")[0] == operands
    met, least = gpu.counted("shared", "operands.h", "gemm.cu", "outputs.h")
    assert met == least > 0


def size_of(gpu: Emulator, m: int, n: int, k: int, groups: int = 1) -> int:
    call = Linear(None, None, None, m, n, k, groups, Output(), False, None)
    return gpu.library.run_partial_bytes(ctypes.byref(call))


def test_memory_for_sums_is_asked_for_where_they_are_in_parts(gpu: Emulator) -> None:
    """Rows of sums are whole units of 8; groups are summed as floats, in order, and so never in parts."""
    assert size_of(gpu, 64, 1001, 8192) == plan(gpu, 132, 64, 1001, 8192)[1] * 64 * 1008 * 4
    assert plan(gpu, 132, 64, 1001, 8192)[1] == 16
    assert size_of(gpu, 64, 576, 576) == size_of(gpu, 0, 512, 8192) == size_of(gpu, 64, 1001, 8192, 4) == 0


def test_a_training_layer_takes_parts_by_itself(place, gpu: Emulator) -> None:
    device, op = place
    x, w = tokens(3, 1600, torch.float32).to(device), torch.randn(40, 1600, device=device)
    found = fused.ops_for(QuantConfig(), w)
    gpu.dry(True)
    gpu.launched()
    found.forward(x, w, None, *found.arguments)
    gpu.dry(False)
    assert device.type == "cuda" or "add_kernel<float>" in gpu.launched()
    y = found.forward(x, w, None, *found.arguments)
    same(y, op("bitlinear", x, w, None, [], *training_options(QuantConfig()))[0])


@pytest.mark.parametrize("shape", [(1, 40, 1600), (20, 9, 2100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_take_parts_by_themselves(place, gpu: Emulator, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    (m, n, k), (device, op) = shape, place
    assert plan(gpu, 132, m, n, k)[1] > 1
    p = problem(m, n, k, dtype=dtype)
    x, t, scale, bias = (one.to(device) for one in (p.x, p.t, p.scale, p.bias))
    y, x_q, x_scale = torch.ops.qat.cuda_bitlinear(x, t, scale, bias, False, EPS)
    same(y.cpu(), expected_linear(p))
    packed = packing.pack_ternary(p.t, "2bit").to(device)
    same(torch.ops.qat.cuda_packed_linear(x, packed, scale, bias, k, False, EPS, False).cpu(), expected_linear(p))
    a, b = x_q.cpu(), torch.randint(-128, 128, (k, n), dtype=torch.int8)
    same(op("int8_matmul", a.to(device), b.to(device)), reference.int8_matmul(a, b))


# N, K of a layer -> (tile, splits) for 64, 128, 256, 512 and 1,024 tokens
H100 = {
    "SmolLM2-135M q, o": ((576, 576), "small/1 small/1 small/1 small/1 small/1"),  # 9 stages: the launch that adds takes as long
    "SmolLM2-135M k, v": ((192, 576), "small/1 small/1 small/1 small/1 small/1"),
    "SmolLM2-135M gate, up": ((1536, 576), "small/1 small/1 small/1 small/1 small/1"),
    "SmolLM2-135M down": ((576, 1536), "small/6 small/6 small/3 small/1 small/1"),
    "1B q, o": ((2048, 2048), "small/4 small/4 small/1 small/1 medium/1"),
    "1B k, v": ((512, 2048), "small/8 small/8 small/4 small/4 small/1"),
    "1B gate, up": ((8192, 2048), "small/1 small/1 medium/1 large/1 large/1"),
    "1B down": ((2048, 8192), "small/8 small/4 medium/4 small/1 medium/1"),
    "2B down": ((2560, 6912), "small/6 small/3 medium/3 large/3 small/1"),
}
FEW = {  # 28 multiprocessors: the tiles fill them sooner
    "SmolLM2-135M q, o": "small/1 small/1 small/1 small/1 small/1",
    "SmolLM2-135M k, v": "small/1 small/1 small/1 small/1 small/1",
    "SmolLM2-135M gate, up": "small/1 small/1 medium/1 large/1 large/1",
    "SmolLM2-135M down": "small/3 small/1 small/1 small/1 small/1",
    "1B q, o": "small/1 small/1 small/1 small/1 medium/1",
    "1B k, v": "small/3 small/1 small/1 small/1 small/1",
    "1B gate, up": "small/1 small/1 medium/1 large/1 large/1",
    "1B down": "small/3 large/3 small/1 small/1 medium/1",
    "2B down": "small/1 small/1 small/1 medium/1 large/1",
}
TOKENS = (64, 128, 256, 512, 1024)


@pytest.mark.parametrize("layer", H100)
def test_plans(gpu: Emulator, layer: str) -> None:
    (n, k), wanted = H100[layer]
    for sms, plans in ((132, wanted), (28, FEW[layer])):
        found = [plan(gpu, sms, m, n, k) for m in TOKENS]
        assert " ".join(f"{tile}/{splits}" for tile, splits in found) == plans


@pytest.mark.parametrize("sms", [16, 28, 108, 132, 188])
def test_splits_leave_no_multiprocessor_idle_that_had_none(gpu: Emulator, sms: int) -> None:
    """Every part has four stages or more, none is empty, and there are at most four waves; without memory there is one."""
    sides = {"small": (64, 64), "medium": (128, 128), "large": (128, 256)}
    for m in (1, 17, 64, 300, 1024, 1 << 40):
        for n, k in ((64, 8192), (512, 2048), (2048, 8192), (13824, 2560), (1000, 1 << 18)):
            tile, splits = plan(gpu, sms, m, n, k)
            stages, (rows, columns) = -(-k // 64), sides[tile]
            assert 1 <= splits <= 16 and (splits == 1 or stages // splits >= 4)
            assert -(-stages // -(-stages // splits)) == splits
            tiles = -(-m // rows) * -(-n // columns)
            assert splits == 1 or tiles * splits <= 4 * sms
            assert plan(gpu, sms, m, n, k, may_split=False)[1] == plan(gpu, sms, m, n, k * 4, groups=4)[1] == 1
