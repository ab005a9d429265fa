"""The CUDA kernels, run on the CPU by csrc/cuda/emulation.h, give the reference's integers, and its floats to the bit.

Nothing here needs a GPU or nvcc: the .cu files are compiled by the C++ compiler, one fiber a thread. Threads run in three
extreme orders, memory is guarded, and `test_every_barrier_matters` takes each barrier and wait out in turn.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import Structure, c_bool, c_float, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import qat
from qat import packing, quantizers
from qat.ops import reference

ROOT = Path(qat.__file__).resolve().parent.parent
FLAGS = [
    "-x",
    "c++",
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-DQAT_EMULATE",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-Wno-unknown-pragmas",
]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
if COMPILER is None:
    pytest.skip("no C++ compiler to emulate the CUDA kernels with", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["2bit", "base3"]
GRANULARITIES = ["tensor", "channel", "group"]
REDUCES = ["absmean", "absmax"]
TILES = ["small", "medium", "large", "hopper"]
EPS = 1e-5


class QuantizeActivation(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("dtype", c_int),
        ("m", c_int64),
        ("k", c_int64),
        ("per_tensor", c_bool),
        ("eps", c_float),
        ("norm_weight", c_void_p),
        ("norm_eps", c_float),
        ("codes", c_void_p),
        ("divisor", c_void_p),
        ("scale", c_void_p),
        ("workspace", c_void_p),
    ]


class QuantizeWeight(Structure):
    _fields_ = [
        ("w", c_void_p),
        ("dtype", c_int),
        ("n", c_int64),
        ("k", c_int64),
        ("groups", c_int64),
        ("granularity", c_int),
        ("reduce", c_int),
        ("binary", c_bool),
        ("scale_dtype", c_int),
        ("eps", c_float),
        ("t", c_void_p),
        ("packed", c_void_p),
        ("scale", c_void_p),
        ("workspace", c_void_p),
    ]


class Output(Structure):
    _fields_ = [("y", c_void_p), ("dtype", c_int), ("scale", c_void_p), ("scale_stride", c_int64), ("bias", c_void_p)]


class Linear(Structure):
    _fields_ = [
        ("codes", c_void_p),
        ("divisor", c_void_p),
        ("t", c_void_p),
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("groups", c_int64),
        ("out", Output),
        ("raw", c_bool),
    ]


class PackedLinear(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("per_tensor", c_bool),
        ("eps", c_float),
        ("packed", c_void_p),
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("groups", c_int64),
        ("out", Output),
        ("codes", c_void_p),
        ("divisor", c_void_p),
        ("workspace", c_void_p),
        ("overlap", c_bool),
    ]


def compiled() -> Path:
    """The emulated kernels as a shared library, built once for this content."""
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "tests" / "emulation.cpp"]
    headers = sorted((ROOT / "csrc" / "cuda").glob("*.h"))
    key = hashlib.sha256(b"\0".join([" ".join(FLAGS).encode(), *(file.read_bytes() for file in [*sources, *headers])]))
    root = Path(os.environ.get("QAT_BUILD_DIR") or Path.home() / ".cache" / "qat" / "build")
    folder = root / f"emulation-{key.hexdigest()[:16]}"
    library = folder / "emulation.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.name}.{os.getpid()}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        done = subprocess.run([str(COMPILER), *FLAGS, "-c", source, "-o", target], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{source.name} does not compile for the emulation:\n{done.stderr[:3000]}"

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    finished = folder / f"{os.getpid()}.so"
    subprocess.run([str(COMPILER), "-shared", "-o", finished, *objects], check=True)
    finished.rename(library)
    for file in objects:
        file.unlink()
    return library


def passed(argument: Any) -> Any:
    """Structures by pointer; numbers and addresses as 64 bits."""
    return ctypes.byref(argument) if isinstance(argument, Structure) else c_int64(argument or 0)


class Emulator:
    """Memory that is guarded on the side that `at_end` says, and the kernels on it, threads in order `order`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.order, self.at_end = library, 0, True
        self.buffers: list[int] = []
        library.emulation_allocate.restype = c_void_p
        library.emulation_allocate.argtypes = [c_int64, c_bool]
        library.emulation_data.restype = c_void_p
        library.emulation_data.argtypes = [c_void_p]
        library.emulation_free.argtypes = [c_void_p]
        library.emulation_failure.restype = ctypes.c_char_p
        library.emulation_sites.restype = ctypes.c_char_p
        library.run_packed_linear_fused.restype = c_bool

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[int, Callable[[], Tensor]]:
        """Poisoned memory: its address, and a function that reads it."""
        like = torch.empty(shape, dtype=dtype)
        size = like.numel() * like.element_size()
        buffer = self.library.emulation_allocate(size, self.at_end)
        self.buffers.append(buffer)
        address = self.library.emulation_data(buffer)

        def read() -> Tensor:
            ctypes.memmove(like.data_ptr(), address, size)
            return like

        return address, read

    def put(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        address, _ = self.empty(*tensor.shape, dtype=tensor.dtype)
        ctypes.memmove(address, tensor.data_ptr(), tensor.numel() * tensor.element_size())
        return address

    def run(self, name: str, *arguments: Any) -> None:
        """Launch; AssertionError with what the emulation saw, unless it went well."""
        self.library.emulation_order(c_uint64(self.order))
        error = getattr(self.library, name)(*map(passed, arguments))
        assert error == 0, f"{name}: error {error}: {self.library.emulation_failure().decode()}"

    def skip(self, site: str | None) -> None:
        """Take out the barriers of one source line, as `file:line`."""
        file, _, line = (site or ":0").rpartition(":")
        self.library.emulation_skip(file.encode(), int(line))

    def sites(self) -> list[str]:
        return self.library.emulation_sites().decode().split()

    def free(self) -> None:
        for buffer in self.buffers:
            self.library.emulation_free(buffer)
        self.buffers.clear()


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(compiled()))


@pytest.fixture
def gpu(library: ctypes.CDLL) -> Iterator[Emulator]:
    emulator = Emulator(library)
    yield emulator
    emulator.skip(None)
    emulator.free()


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} differ, by up to {(a.double() - b.double()).abs().max()}"


def tokens(m: int, k: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(m, k) * torch.logspace(-4, 3, max(m, 1))[:m, None]
    if m > 2:
        x[1] = 0  # an all-zero token
    return x.to(dtype)


def quantize_activation(gpu: Emulator, x: Tensor, per_tensor: bool, norm: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    m, k = x.shape
    codes, read_codes = gpu.empty(m, k, dtype=torch.int8)
    divisor, read_divisor = gpu.empty(m, 1)
    scale, read_scale = gpu.empty(m, 1)
    workspace, _ = gpu.empty(16384, dtype=torch.uint8)
    arguments = (per_tensor, EPS, gpu.put(norm), 1e-6, codes, divisor, scale, workspace)
    gpu.run("run_quantize_activation", QuantizeActivation(gpu.put(x), DTYPES.index(x.dtype), m, k, *arguments))
    return read_codes(), read_divisor(), read_scale()


# K around 16 bytes, the loads a warp or a block keeps, and beyond them
ACTIVATIONS = [(1, 1), (9, 5), (3, 64), (2, 72), (17, 576), (2, 2560), (2, 4100), (1, 6912), (1, 16500)]


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_activation(gpu: Emulator, dtype: torch.dtype, per_tensor: bool) -> None:
    for i, (m, k) in enumerate(ACTIVATIONS):
        gpu.order, gpu.at_end = i % 3, i % 2 == 0
        x = tokens(m, k, dtype)
        codes, divisor, scale = quantize_activation(gpu, x, per_tensor)
        expected, expected_divisor = quantizers.activation_codes(x, "tensor" if per_tensor else "token", EPS)
        same(codes, expected)
        same(divisor, expected_divisor.contiguous())
        same(scale, 1 / expected_divisor)


def test_nan_stays_in_its_token(gpu: Emulator) -> None:
    x = torch.randn(3, 80)
    x[1, 70] = torch.nan
    codes, divisor, _ = quantize_activation(gpu, x, per_tensor=False)
    expected, expected_divisor = quantizers.activation_codes(x, "token", EPS)
    assert divisor.isnan().flatten().tolist() == [False, True, False]
    same(codes[[0, 2]], expected[[0, 2]])
    same(divisor[[0, 2]], expected_divisor[[0, 2]])


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("k", [72, 4000, 16500])
def test_norm_in_front(gpu: Emulator, k: int, per_tensor: bool) -> None:
    x, weight = torch.randn(3, k).bfloat16(), (1 + torch.randn(k) / 8).bfloat16()
    codes, divisor, _ = quantize_activation(gpu, x, per_tensor, weight)
    normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    expected, expected_divisor = quantizers.activation_codes(weight * normal.bfloat16(), "tensor" if per_tensor else "token", EPS)
    # the sum of squares has another order than torch's: a product may round to the next bfloat16
    assert (codes.int() - expected.int()).abs().max() <= 1
    assert (codes != expected).float().mean() < 0.01
    torch.testing.assert_close(divisor, expected_divisor.contiguous(), rtol=2**-7, atol=0)


class Weights(SimpleNamespace):
    """What quantize_weight gives: t, packed, scale."""


def quantize_weight(
    gpu: Emulator, w: Tensor, scheme: str, reduce: str, granularity: str, groups: int, scale_dtype: int = 0
) -> Weights:
    n, k = w.shape
    rows = {"tensor": (1, 1), "channel": (n, 1), "group": (n, groups)}[granularity]
    t, read_t = gpu.empty(n, k, dtype=torch.int8)
    packed, read_packed = gpu.empty(n, -(-k // 4), dtype=torch.uint8)
    scale, read_scale = gpu.empty(*rows)
    workspace, _ = gpu.empty(16384, dtype=torch.uint8)
    kinds = GRANULARITIES.index(granularity), REDUCES.index(reduce), scheme == "binary"
    arguments = (*kinds, scale_dtype, EPS, t, packed, scale, workspace)
    gpu.run("run_quantize_weight", QuantizeWeight(gpu.put(w), DTYPES.index(w.dtype), n, k, groups, *arguments))
    return Weights(t=read_t(), packed=read_packed(), scale=read_scale())


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
        rows, expected, shape = quantizers.weight_scale(
            w, reduce, granularity, k // groups if granularity == "group" else None, names[scale_dtype], EPS
        )
        # a mean is a sum in another order; rounded to 16 bits it may be the next one
        tolerance = 0 if reduce == "absmax" else {0: 1e-6, 1: 2**-7, 2: 2**-10}[scale_dtype]
        torch.testing.assert_close(found.scale, expected.reshape(shape), rtol=tolerance, atol=0)
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


class Problem(SimpleNamespace):
    """A linear: x, t, packed, scale, bias."""


def problem(
    m: int, n: int, k: int, groups: int = 1, scales: str = "row", dtype: torch.dtype = torch.bfloat16, bias: bool = True
) -> Problem:
    t = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    scale = torch.rand(n if scales == "row" else 1, groups) / 20 + 0.001
    packed = packing.pack_ternary(t, "2bit")
    return Problem(x=tokens(m, k, dtype), t=t, packed=packed, scale=scale, bias=torch.randn(n) if bias else None, groups=groups)


def expected_linear(p: Problem, granularity: str = "token") -> Tensor:
    return reference.packed_linear(p.x, p.packed, p.scale, p.bias, p.x.shape[1], "2bit", 8, granularity, EPS)


def output(gpu: Emulator, p: Problem) -> tuple[Output, Callable[[], Tensor]]:
    y, read = gpu.empty(p.x.shape[0], p.t.shape[0], dtype=p.x.dtype)
    stride = p.groups if p.scale.shape[0] > 1 else 0
    return Output(y, DTYPES.index(p.x.dtype), gpu.put(p.scale), stride, gpu.put(p.bias)), read


def packed_linear(gpu: Emulator, p: Problem, per_tensor: bool = False, tile: str | None = None) -> Tensor:
    """By the path that the shape takes, or by the one of many tokens with that tile."""
    (m, k), n, length = p.x.shape, p.t.shape[0], p.x.shape[1] // p.groups
    out, read = output(gpu, p)
    codes, _ = gpu.empty(m, p.groups * -(-length // 64) * 64, dtype=torch.int8)
    divisor, _ = gpu.empty(m)
    workspace, _ = gpu.empty(16384, dtype=torch.uint8)
    call = PackedLinear(gpu.put(p.x), per_tensor, EPS, gpu.put(p.packed), m, n, k, p.groups, out, codes, divisor, workspace, True)
    if tile is None:
        if gpu.library.run_packed_linear_fused(ctypes.byref(call)):
            call.codes = call.divisor = call.workspace = None
        gpu.run("run_packed_linear", call)
    else:
        gpu.run("run_packed_gemm", call, TILES.index(tile))
    return read()


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


def linear(gpu: Emulator, p: Problem, tile: str | None = None, raw: bool = False) -> Tensor:
    codes, divisor = quantizers.activation_codes(p.x, "token", EPS)
    out, read = output(gpu, p)
    if raw:
        out.y, read = gpu.empty(p.x.shape[0], p.t.shape[0], dtype=torch.int32)
        out.scale = out.bias = divisor = None
    (m, k), n = p.x.shape, p.t.shape[0]
    call = Linear(gpu.put(codes), gpu.put(divisor), gpu.put(p.t), m, n, k, p.groups, out, raw)
    if tile is None:
        gpu.run("run_linear", call)
    else:
        gpu.run("run_gemm", call, TILES.index(tile))
    return read()


@pytest.mark.parametrize("tile", [None, *TILES[:3]])
@pytest.mark.parametrize("shape", [(130, 270, 320, 1), (1, 1, 1, 1), (7, 33, 75, 3), (70, 40, 256, 4), (40, 150, 61, 1)], ids=str)
def test_training_forward(gpu: Emulator, shape: tuple[int, int, int, int], tile: str | None) -> None:
    gpu.order = (shape[0] + len(tile or "")) % 3
    p = problem(*shape, dtype=DTYPES[gpu.order])
    same(linear(gpu, p, tile), expected_linear(p))


@pytest.mark.parametrize("tile", TILES)
def test_integers_before_rescaling(gpu: Emulator, tile: str) -> None:
    p = problem(37, 75, 160)
    codes, _ = quantizers.activation_codes(p.x, "token", EPS)
    same(linear(gpu, p, tile, raw=True), codes.int() @ p.t.int().t())


@pytest.mark.parametrize("shape", [(300, 200, 832, 1), (1, 130, 64, 1), (260, 33, 576, 1)], ids=str)
def test_hopper_products(gpu: Emulator, shape: tuple[int, int, int, int]) -> None:
    gpu.order = shape[0] % 3
    for scales, bias, dtype in [("row", True, torch.bfloat16), ("one", False, torch.float32)]:
        p = problem(*shape, scales=scales, dtype=dtype, bias=bias)
        same(packed_linear(gpu, p, tile="hopper"), expected_linear(p))
        same(linear(gpu, p, "hopper"), expected_linear(p))


def test_wrong_arguments_are_refused(gpu: Emulator) -> None:
    p = problem(2, 4, 64)
    with pytest.raises(AssertionError, match="error 1"):
        gpu.run("run_linear", Linear(None, None, None, 2, 4, 64, 3, Output(), False))
    call = PackedLinear(gpu.put(p.x), False, EPS, gpu.put(p.packed), 2, 4, 64, 1, output(gpu, p)[0], None, None, None, False)
    with pytest.raises(AssertionError, match="error 1"):
        gpu.run("run_packed_linear", call)


@pytest.mark.parametrize("at_end", [True, False])
def test_access_outside_of_memory_is_caught(gpu: Emulator, at_end: bool) -> None:
    """Told of one row more, or given the row before, the kernel touches the guard page."""
    gpu.at_end = at_end
    x, codes = gpu.put(torch.randn(2, 64)), gpu.empty(2, 64, dtype=torch.int8)[0]
    assert x is not None
    shift, m = (0, 3) if at_end else (-256, 1)
    with pytest.raises(AssertionError, match="outside of memory"):
        gpu.run("run_quantize_activation", QuantizeActivation(x + shift, 0, m, 64, False, EPS, None, 0, codes, None, None, None))


BROKEN = ["deadlock: thread", "a divergent warp: another lane is at", "outside of memory by thread 3", "a misaligned copy"]


@pytest.mark.parametrize("kind", range(len(BROKEN)))
def test_broken_kernels_are_caught(gpu: Emulator, kind: int) -> None:
    for gpu.order in range(3):
        with pytest.raises(AssertionError, match=BROKEN[kind]):
            gpu.run("run_broken", kind)


def decode_one(gpu: Emulator) -> None:
    p = problem(1, 130, 1344, dtype=torch.float32)
    p.x[0, -1] = 50  # what the first threads must wait for
    same(packed_linear(gpu, p), expected_linear(p))


def decode_few(gpu: Emulator) -> None:
    p = problem(11, 40, 1600)
    same(packed_linear(gpu, p), expected_linear(p))


def decode_groups(gpu: Emulator) -> None:
    p = problem(2, 40, 2048, 4)
    same(packed_linear(gpu, p), expected_linear(p))


def many_tokens(gpu: Emulator) -> None:
    p = problem(66, 70, 576)
    same(packed_linear(gpu, p, tile="small"), expected_linear(p))


def many_tokens_on_hopper(gpu: Emulator) -> None:
    p = problem(140, 100, 768, dtype=torch.float32)
    same(packed_linear(gpu, p, tile="hopper"), expected_linear(p))


def long_token(gpu: Emulator) -> None:
    x = tokens(2, 4500, torch.float32)
    same(quantize_activation(gpu, x, per_tensor=False)[0], quantizers.activation_codes(x, "token", EPS)[0])


def long_norm(gpu: Emulator) -> None:
    x = tokens(1, 4500, torch.float32).abs()
    codes = quantize_activation(gpu, x, False, torch.ones(4500))[0]
    normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert (codes.int() - quantizers.activation_codes(normal, "token", EPS)[0].int()).abs().max() <= 1


def weight_tensor(gpu: Emulator) -> None:
    w = torch.randn(64, 400)
    w[-1] *= 50
    found = quantize_weight(gpu, w, "binary", "absmean", "tensor", 1)
    torch.testing.assert_close(found.scale, w.abs().mean().reshape(1, 1))
    same(found.t, torch.where(w > w.double().mean(), 1, -1).to(torch.int8))


WORK = [decode_one, decode_few, decode_groups, many_tokens, many_tokens_on_hopper, long_token, long_norm, weight_tensor]


def test_every_barrier_matters(gpu: Emulator) -> None:
    """Each barrier and wait that a kernel meets is taken out; in at least one order of threads the result is then wrong."""
    reached: dict[str, list[Callable[[Emulator], None]]] = {}
    gpu.sites()
    for work in WORK:
        work(gpu)
        for site in gpu.sites():
            reached.setdefault(site, []).append(work)
    assert {site.partition(":")[0] for site in reached} == {"decode.cu", "gemm.cu", "gemm_hopper.cu", "reduce.h"}, sorted(reached)

    def noticed(site: str, work: Callable[[Emulator], None]) -> bool:
        for order in range(3):
            gpu.order = order
            gpu.skip(site)
            try:
                work(gpu)
            except AssertionError:
                return True
            finally:
                gpu.skip(None)
                gpu.free()
        return False

    pairs = [(site, work) for site, works in sorted(reached.items()) for work in works]
    unnoticed = [f"{site} in {work.__name__}" for site, work in pairs if not noticed(site, work)]
    assert not unnoticed, f"nothing fails without the barrier at {', '.join(unnoticed)}"
