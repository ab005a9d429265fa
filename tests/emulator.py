"""The CUDA kernels on the CPU: csrc/cuda compiled for csrc/emulation, and its launchers as functions of tensors.

Nothing here needs a GPU or nvcc. `Emulator` holds guarded memory and the switches: the order of threads, and a barrier to skip.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ctypes import Structure, c_bool, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from kernel_checks import DTYPES, EPS, tokens
from mirrors import MIRRORS, Linear, Output, PackedLinear, QuantizeActivation, QuantizeWeight, check
from torch import Tensor

import qat
from qat.ops import reference
from qat.ops.build.store import build_root, digest, matching
from qat.quantizers import activations, packing

ROOT = Path(qat.__file__).resolve().parent.parent
FLAGS = ["-x", "c++", "-std=c++20", "-O1", "-fPIC", "-DQAT_EMULATE"]
FLAGS += ["-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
GRANULARITIES = ["tensor", "channel", "group"]
REDUCES = ["absmean", "absmax"]
TILES = ["small", "medium", "large", "hopper"]


def csrc(*patterns: str) -> list[Path]:
    return matching(ROOT / "csrc", *patterns)


def compiled_kernels() -> Path:
    """The emulated kernels as a shared library, built once for this content."""
    sources = [*csrc("cuda/*.cu"), ROOT / "tests" / "emulation.cpp"]
    key = digest(" ".join(FLAGS), *(file.read_bytes() for file in [*sources, *csrc("cuda/*.h", "emulation/*.h")]))
    folder = build_root() / f"emulation-{key}"
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


def load_kernels() -> ctypes.CDLL:
    """The emulated kernels, loaded; their structs are the mirrors'."""
    library = ctypes.CDLL(str(compiled_kernels()))
    check(library, MIRRORS)
    return library


def compiled_ops() -> Path:
    """csrc/ops_cuda* for the emulation, linked with the emulated kernels; kept beside them."""
    kernels, sources, torch_folder = compiled_kernels(), csrc("ops_cuda*.cpp"), Path(torch.__file__).parent
    headers = csrc("ops_cuda*.h", "ops_gradients.h", "cuda/kernels.h", "emulation/stream.h")
    key = digest(torch.__version__, *(file.read_bytes() for file in [*sources, *headers]))
    library = kernels.parent / f"ops-{key}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        command = [str(COMPILER), *FLAGS, "-DTORCH_TARGET_VERSION=0x020b000000000000", "-shared", "-o", str(made)]
        command += [*map(str, sources), "-isystem", str(torch_folder / "include"), "-x", "none", str(kernels)]
        command += [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", "-Wl,-z,defs"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ops_cuda* do not compile for the emulation:\n{done.stderr[:3000]}"
        made.rename(library)
    return library


@cache
def kernel_names(library: str) -> dict[int, str]:
    """Every kernel instance in the library, by where it begins; a kernel is a function of one struct of parameters."""
    found = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout
    symbols = [line.split(maxsplit=2) for line in found.splitlines() if " t " in line or " T " in line]
    origin = next(int(at, 16) for at, _, name in symbols if name == "emulation_launched")
    plain = {int(at, 16) - origin: name.replace("qat::cuda::(anonymous namespace)::", "") for at, _, name in symbols}
    return {at: name.removeprefix("void ").rpartition("(")[0] for at, name in plain.items()}


def passed(argument: Any) -> Any:
    """Structures by pointer; numbers and addresses as 64 bits."""
    return ctypes.byref(argument) if isinstance(argument, Structure) else c_int64(argument or 0)


class Emulator:
    """Memory that is guarded on the side that `at_end` says, and the kernels on it, threads in order `order`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.order, self.at_end = library, 0, True
        self.buffers: list[int] = []
        self.counts: list[str] = []
        library.emulation_allocate.restype = c_void_p
        library.emulation_allocate.argtypes = [c_int64, c_bool]
        library.emulation_data.restype = c_void_p
        library.emulation_data.argtypes = [c_void_p]
        library.emulation_free.argtypes = [c_void_p]
        library.emulation_failure.restype = ctypes.c_char_p
        library.emulation_sites.restype = ctypes.c_char_p
        library.emulation_counts.restype = ctypes.c_char_p
        library.emulation_launched.restype = ctypes.c_char_p
        library.run_packed_linear_fused.restype = c_bool
        for sizes in (library.run_plan, library.run_partial_bytes, library.run_packed_partial_bytes):
            sizes.restype = c_int64

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

    def counted(self, memory: str, *files: str) -> tuple[int, int]:
        """(sectors or wavefronts met, the least that so many bytes take) in these files since the last call of `count`."""
        found = [line.split() for line in self.counts if line.startswith(memory)]
        chosen = [line for line in found if not files or line[1].partition(":")[0] in files]
        return sum(int(line[2]) for line in chosen), sum(int(line[3]) for line in chosen)

    @contextmanager
    def count(self) -> Iterator[None]:
        """Launches are counted; `counted` says what, and `counts` each line."""
        self.library.emulation_count(c_bool(True))
        self.library.emulation_counts()
        try:
            yield
        finally:
            self.library.emulation_count(c_bool(False))
            self.counts = self.library.emulation_counts().decode().splitlines()

    def dry(self, on: bool) -> None:
        """Launches are only noted."""
        self.library.emulation_dry(c_bool(on))

    def launched(self) -> set[str]:
        """The kernels launched while it was dry, since the last call."""
        names = kernel_names(self.library._name)
        return {names[int(line)] for line in self.library.emulation_launched().decode().split()}

    def free(self) -> None:
        for buffer in self.buffers:
            self.library.emulation_free(buffer)
        self.buffers.clear()


def quantize_activation(gpu: Emulator, x: Tensor, per_tensor: bool, norm: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    m, k = x.shape
    codes, read_codes = gpu.empty(m, k, dtype=torch.int8)
    divisor, read_divisor = gpu.empty(m, 1)
    scale, read_scale = gpu.empty(m, 1)
    workspace, _ = gpu.empty(16384, dtype=torch.uint8)
    arguments = (per_tensor, EPS, gpu.put(norm), 1e-6, codes, divisor, scale, workspace)
    gpu.run("run_quantize_activation", QuantizeActivation(gpu.put(x), DTYPES.index(x.dtype), m, k, *arguments))
    return read_codes(), read_divisor(), read_scale()


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


def plan(gpu: Emulator, sms: int, m: int, n: int, k: int, groups: int = 1, may_split: bool = True) -> tuple[str, int]:
    """The tile and the splits of K that a GEMM takes on a device of so many multiprocessors."""
    splits, tile = divmod(gpu.library.run_plan(*map(c_int64, (sms, m, n, k, groups)), c_bool(may_split)), 4)
    return TILES[tile], splits


def partial(gpu: Emulator, size: int) -> int | None:
    """Poisoned memory for the sums of splits."""
    return gpu.empty(size // 4, dtype=torch.int32)[0] if size else None


def sums_of(m: int, n: int, splits: int) -> int:
    """Bytes of the sums of splits that a test asks for; rows are whole units of 8."""
    return splits * m * -(-n // 8) * 8 * 4 if splits > 1 else 0


def packed_linear(gpu: Emulator, p: Problem, per_tensor: bool = False, tile: str | None = None, splits: int = 1) -> Tensor:
    """By the path that the shape takes, or by the one of many tokens with that tile and so many splits."""
    (m, k), n, length = p.x.shape, p.t.shape[0], p.x.shape[1] // p.groups
    out, read = output(gpu, p)
    codes, _ = gpu.empty(m, p.groups * -(-length // 64) * 64, dtype=torch.int8)
    divisor, _ = gpu.empty(m)
    workspace, _ = gpu.empty(16384, dtype=torch.uint8)
    scratch = codes, divisor, workspace, None
    call = PackedLinear(gpu.put(p.x), per_tensor, EPS, gpu.put(p.packed), m, n, k, p.groups, out, *scratch, True)
    if tile is None:
        call.partial = partial(gpu, gpu.library.run_packed_partial_bytes(ctypes.byref(call)))
        if gpu.library.run_packed_linear_fused(ctypes.byref(call)):
            call.codes = call.divisor = call.workspace = None
        gpu.run("run_packed_linear", call)
    else:
        call.partial = partial(gpu, sums_of(m, n, splits))
        gpu.run("run_packed_gemm", call, TILES.index(tile), splits)
    return read()


def linear(gpu: Emulator, p: Problem, tile: str | None = None, raw: bool = False, splits: int = 1) -> Tensor:
    codes, divisor = activations.activation_codes(p.x, "token", EPS)
    out, read = output(gpu, p)
    if raw:
        out.y, read = gpu.empty(p.x.shape[0], p.t.shape[0], dtype=torch.int32)
        out.scale = out.bias = divisor = None
    (m, k), n = p.x.shape, p.t.shape[0]
    call = Linear(gpu.put(codes), gpu.put(divisor), gpu.put(p.t), m, n, k, p.groups, out, raw, None)
    if tile is None:
        call.partial = partial(gpu, gpu.library.run_partial_bytes(ctypes.byref(call)))
        gpu.run("run_linear", call)
    else:
        call.partial = partial(gpu, sums_of(m, n, splits))
        gpu.run("run_gemm", call, TILES.index(tile), splits)
    return read()
