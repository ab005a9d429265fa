"""The CPU's time for the calls of an eager layer, forward and backward: what binds a small model, on a GPU or without one.

python -m benchmarks.gpu.calls          the CPU's kernels on a layer that is nearly nothing, 32 x 32 with 4 tokens
python -m benchmarks.gpu.calls --gpu    the path of a GPU with kernels that do nothing, on CPU tensors; needs g++, and no GPU

Eight layers run in a row, as in a model, and the time is that of one. Variants take turns call by call, so that a busy machine
harms all alike; printed are the least, a tenth and the median of the calls. Latent weights change before each forward, as they do
in training. `ops` is the way of `qat.ops`, one call after the other.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qat import BitLinear, QuantConfig, ops
from qat.ops import cpu, cuda
from qat.ops.bits import kernels as bits
from qat.ops.fused import cuda as fused_cuda
from qat.ops.fused.linear import FusedLinear

ROOT = Path(__file__).resolve().parents[2]
WIDTH, TOKENS, LAYERS, ROUNDS = 32, 4, 8, 1500
Run = Callable[[nn.Module, Tensor], Tensor]
Rows = tuple[Sequence[nn.Module], Run]


def load_nothing() -> None:
    """csrc/ops_cuda*.cpp on CPU tensors, linked with kernels that do nothing, in place of the CPU's ops."""
    place, torch_folder = Path(tempfile.mkdtemp()) / "nothing.so", Path(torch.__file__).parent
    sources = [*sorted((ROOT / "csrc").glob("ops_cuda*.cpp")), Path(__file__).with_name("nothing.cpp")]
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-DQAT_EMULATE", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    folders = [f"-I{ROOT / 'csrc'}", "-isystem", str(torch_folder / "include"), f"-L{torch_folder / 'lib'}"]
    subprocess.run(["g++", *flags, *folders, "-o", str(place), *map(str, sources), "-lc10", "-ltorch_cpu"], check=True)
    torch.ops.load_library(place)
    cuda._serves = lambda x, k=0: True  # type: ignore[assignment]
    library = torch.library.Library("qat", "IMPL")
    for name, kernel in {**cuda.KERNELS, **bits.CUDA}.items():
        library.impl(name, kernel, "CPU", allow_override=True)
    bits.cuda._serves = cuda._serves
    _kept.append(library)


_kept: list[torch.library.Library] = []  # an override lives as long as its library


def on_gpu_path(layer: BitLinear) -> None:
    """Let the layer call the GPU's one op."""
    found = fused_cuda.ops_for(layer.config, layer.weight)
    assert found is not None
    layer._fused = FusedLinear(layer.config, layer.weight.shape, layer.weight.device, found)


def through_ops(layer: nn.Module, x: Tensor) -> Tensor:
    """As layers do that no one op serves."""
    assert isinstance(layer, BitLinear)
    return ops.bitlinear(x, layer.weight, layer.bias, layer.config, list(layer.quantizer_parameters().values()))


def layers(gpu: bool) -> dict[str, Rows]:
    """name -> layers in a row, and how one of them is called."""
    plain = [nn.Linear(WIDTH, WIDTH, False) for _ in range(LAYERS)]
    ours = [BitLinear(WIDTH, WIDTH, False, QuantConfig()) for _ in range(LAYERS)]
    if gpu:
        for layer in ours:
            on_gpu_path(layer)
    return {"nn.Linear": (plain, nn.Module.__call__), "ops": (ours, through_ops), "BitLinear": (ours, nn.Module.__call__)}


def variants(gpu: bool) -> dict[str, Callable[[], None]]:
    """name -> a forward, or forward and backward, of layers in a row, as a model has them."""
    torch.manual_seed(0)
    x, found = torch.randn(TOKENS, WIDTH, requires_grad=True), {}

    def passes(row: Sequence[nn.Module], run: Run, autocast: bool, grad: Tensor | None) -> None:
        cpu._latent_weights.entries.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = x
            for layer in row:
                y = run(layer, y)
        if grad is not None:
            torch.autograd.backward(y, grad)
            for layer in row:
                layer.weight.grad = None
            x.grad = None

    for name, (row, run) in layers(gpu).items():
        for autocast in (False, True):
            grad = torch.ones(TOKENS, WIDTH, dtype=torch.bfloat16 if autocast else torch.float32)
            what = f"{name}{', autocast' if autocast else ''}"
            found[f"{what}, forward"] = partial(passes, row, run, autocast, None)
            found[f"{what}, forward + backward"] = partial(passes, row, run, autocast, grad)
    return found


def times(calls: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """name -> microseconds a layer in each call, ascending."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # loads and allocates
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append((time.perf_counter() - start) / LAYERS * 1e6)
    return {name: sorted(values) for name, values in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.calls", description=main.__doc__)
    parser.add_argument("--gpu", action="store_true", help="the path of a GPU, with kernels that do nothing")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # of memory that kernels which do nothing leave as it was
    if gpu := parser.parse_args().gpu:
        load_nothing()
    print(f"{'us a layer':42}{'least':>9}{'10 %':>9}{'median':>9}")
    for name, values in times(variants(gpu)).items():
        print(f"{name:42}{values[0]:9.1f}{values[len(values) // 10]:9.1f}{statistics.median(values):9.1f}")


if __name__ == "__main__":
    main()
