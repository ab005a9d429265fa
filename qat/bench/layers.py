"""What `python -m qat.bench` times: linear layers beside their peers, training steps of a layer, and the machine's limits.

The limits take their turns among the rows, because a neighbour may halve them from one second to the next.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat import ops
from qat.bench.ggml import GgmlLinear
from qat.config import QuantConfig
from qat.nn.bitlinear import BitLinear
from qat.nn.packed import PackedBitLinear

COLD_BYTES = 192 << 20
COLD_TOKENS = 32
Call = Callable[[], Any]


@dataclass
class Row:
    """One measurement; `share` is the part of the machine's limit, where one applies."""

    regime: str
    shape: str
    tokens: int
    threads: int
    what: str
    microseconds: float
    gops: float
    share: float | None = None
    ratio: float | None = None


def take_turns(runs: dict[str, Iterator[Call]], seconds: float, untimed: int) -> dict[str, float]:
    """Median seconds of each run's calls. The runs take turns in short blocks, so a busy neighbour meets them all.

    A block begins with `untimed` calls, after which a hot weight is in the cache again.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    stop = time.perf_counter() + seconds * len(runs)
    for rounds in itertools.count():
        if rounds >= 3 and time.perf_counter() > stop:
            break
        for name, calls in runs.items():
            for _ in range(untimed):
                next(calls)()
            for call in itertools.islice(calls, 10):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


@dataclass
class Limits:
    """What this machine can do with so many threads, measured in the turns of the rows it limits."""

    read_gbs: float
    dot_gops: float  # 0 where the path has no such instruction

    READ, DOT = "limit: memory read", "limit: dot products"
    READ_BYTES, DOT_ROUNDS = 4 << 20, 1 << 14

    @classmethod
    def calls(cls, memory: Tensor) -> dict[str, Iterator[Call]]:
        """Read rate: sums over 4 MB at a time of `memory`. Dot product peak: the loop of the kernels, without memory."""
        parts = memory.view(torch.int64).split(cls.READ_BYTES // 8)
        return {
            cls.READ: itertools.cycle([functools.partial(torch.ops.qat.cpu_read, part) for part in parts]),
            cls.DOT: itertools.repeat(functools.partial(torch.ops.qat.cpu_peak, cls.DOT_ROUNDS)),
        }

    @classmethod
    def of(cls, taken: dict[str, float]) -> Limits:
        """From the seconds that the calls took."""
        operations = torch.ops.qat.cpu_peak(1) * cls.DOT_ROUNDS
        return cls(cls.READ_BYTES / taken[cls.READ] / 1e9, operations / taken[cls.DOT] / 1e9)

    def gops(self, operations: float, weight_gb: float, cold: bool) -> float:
        """The highest rate at which `operations` (in 10^9) on a weight of so many 10^9 bytes can run; 0: not known."""
        if self.dot_gops == 0:
            return 0.0
        return operations / max(operations / self.dot_gops, weight_gb / self.read_gbs if cold else 0.0)


def limit_memory() -> Tensor:
    """Bytes to be read for the limit, in huge pages where the system has them: reading small ones is slower, and no limit."""
    memory = mmap.mmap(-1, max(COLD_BYTES, Limits.READ_BYTES))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


def _packed_layer(n: int, k: int, layout: str) -> PackedBitLinear:
    layer = PackedBitLinear(k, n, False, QuantConfig(), layout)
    layer.packed = ops.pack_ternary(torch.randint(-1, 2, (n, k), dtype=torch.int8), layout)
    return layer


def _dynamic_int8(n: int, k: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear = nn.Sequential(nn.Linear(k, n, bias=False))
        return torch.ao.quantization.quantize_dynamic(linear, {nn.Linear}, dtype=torch.qint8)


def _int_mm(n: int, k: int) -> Callable[[Tensor], Tensor]:
    weight = torch.randint(-1, 2, (k, n), dtype=torch.int8)
    return lambda x: torch._int_mm(x, weight)


def _int4(n: int, k: int) -> Callable[[Tensor], Tensor]:
    quantized = torch.randint(0, 16, (n, k), dtype=torch.int32)
    weight = torch._convert_weight_to_int4pack_for_cpu(quantized, 1)
    scales = torch.ones(k // 128, n, 2, dtype=torch.bfloat16)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, weight, 128, scales)


# name -> (makes a callable of x, dtype of x, bytes a weight takes)
PEERS: dict[str, tuple[Callable[[int, int], Any], torch.dtype, float]] = {
    "qat 2bit": (lambda n, k: _packed_layer(n, k, "2bit"), torch.float32, 1 / 4),
    "qat base3": (lambda n, k: _packed_layer(n, k, "base3"), torch.float32, 1 / 5),
    "torch dynamic int8": (_dynamic_int8, torch.float32, 1),
    "nn.Linear fp32": (lambda n, k: nn.Linear(k, n, bias=False), torch.float32, 4),
    "nn.Linear bf16": (lambda n, k: nn.Linear(k, n, bias=False, dtype=torch.bfloat16), torch.bfloat16, 2),
    "torch int4pack": (_int4, torch.bfloat16, 1 / 2),
    "torch _int_mm, raw": (_int_mm, torch.int8, 1),
    "llama.cpp TQ2_0": (lambda n, k: GgmlLinear(n, k, "TQ2_0"), torch.float32, 66 / 256),
}
BASELINE = "torch dynamic int8"


def _input(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-127, 128, (m, k), dtype=torch.int8) if dtype == torch.int8 else torch.randn(m, k).to(dtype)


def _calls(name: str, n: int, k: int, m: int, cold: bool) -> Iterator[Call]:
    """Endless calls of a peer, cold ones over enough weights to outrun the caches."""
    make, dtype, weight_bytes = PEERS[name]
    x, copies = _input(m, k, dtype), COLD_BYTES // int(n * k * weight_bytes) + 1 if cold else 1
    calls = [functools.partial(make(n, k), x) for _ in range(copies)]
    for call in calls:
        call()
    return itertools.cycle(calls)


def measure_linear(
    n: int, k: int, m: int, cold: bool, threads: int, seconds: float, peers: list[str], memory: Tensor
) -> tuple[Limits, list[Row]]:
    """The peers at one shape and number of tokens, and the limits in the same turns; `memory` is what is read for them."""
    runs: dict[str, Iterator[Call]] = Limits.calls(memory)
    rows, operations = [], 2.0 * m * n * k / 1e9
    with torch.no_grad():
        for name in peers:
            try:
                runs[name] = _calls(name, n, k, m, cold)
            except (RuntimeError, AttributeError, ValueError) as error:
                print(f"{name} failed: {str(error).splitlines()[0]}", file=sys.stderr)
        taken = take_turns(runs, seconds, 0 if cold else 2)
    limits = Limits.of(taken)
    for name, duration in taken.items():
        if name in (Limits.READ, Limits.DOT):
            continue
        limit = limits.gops(operations, n * k * PEERS[name][2] / 1e9, cold) if name.startswith("qat") else 0.0
        share = operations / duration / limit if limit else None
        ratio = taken[BASELINE] / duration if BASELINE in taken else None
        rows.append(
            Row("cold" if cold else "hot", f"{n}x{k}", m, threads, name, duration * 1e6, operations / duration, share, ratio)
        )
    return limits, rows


class EagerFakeQuant(nn.Linear):
    """The b1.58 layer as commonly written: quantized values in floating point, straight through."""

    def forward(self, x: Tensor) -> Tensor:
        s = 127 / x.abs().amax(-1, keepdim=True).clamp_min(1e-5)
        x = x + ((x * s).round().clamp(-128, 127) / s - x).detach()
        a = self.weight.abs().mean().clamp_min(1e-5)
        w = self.weight + ((self.weight / a).round().clamp(-1, 1) * a - self.weight).detach()
        return nn.functional.linear(x, w)


def _auto_bit_linear(n: int, k: int) -> nn.Module:
    from transformers.integrations.bitnet import AutoBitLinear

    return AutoBitLinear(k, n, bias=False, online_quant=True)


def _annealed(n: int, k: int, backward: str) -> nn.Module:
    """Half way from a line to codes: the sharpness changes nothing about the time."""
    layer = BitLinear(k, n, False, QuantConfig(backward=backward))
    layer.set_beta(8.0)
    return layer


def training_layers(n: int, k: int, compiled: bool) -> dict[str, Callable[[], nn.Module]]:
    """name -> maker, nn.Linear first: what the others are compared with."""
    layers: dict[str, Callable[[], nn.Module]] = {"nn.Linear": lambda: nn.Linear(k, n, bias=False)}
    for backward in ("input", "bf16", "int8"):
        layers[f"qat backward={backward}"] = lambda b=backward: BitLinear(k, n, False, QuantConfig(backward=b))  # type: ignore[misc]
    for backward in ("input", "bf16"):
        layers[f"qat annealed, backward={backward}"] = lambda b=backward: _annealed(n, k, b)  # type: ignore[misc]
    layers["fake-quant, eager"] = lambda: EagerFakeQuant(k, n, bias=False)
    if compiled:
        layers["fake-quant, torch.compile"] = lambda: torch.compile(EagerFakeQuant(k, n, bias=False))  # type: ignore[assignment,return-value]
    layers["transformers AutoBitLinear"] = lambda: _auto_bit_linear(n, k)
    return layers


def _training_step(layer: nn.Module, x: Tensor, grad: Tensor, autocast: bool) -> Call:
    parameters = list(layer.parameters())

    def step() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.backward(grad.to(y.dtype))
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(1e-9)  # as an optimizer does, so that weight codes are made anew

    return step


def measure_training(n: int, k: int, m: int, threads: int, rounds: int, compiled: bool) -> list[Row]:
    """Forward + backward + a weight change; the layers take turns, so that a busy neighbour meets them all."""
    x, grad, steps = torch.randn(m, k, requires_grad=True), torch.randn(m, n), {}
    for autocast in (False, True):
        for name, make in training_layers(n, k, compiled).items():
            step = _training_step(make(), x, grad.bfloat16() if autocast else grad, autocast)
            try:
                step()
            except (RuntimeError, ImportError, AttributeError, TypeError) as error:
                print(f"{name} failed: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            steps["train bf16 autocast" if autocast else "train fp32", name] = step
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - start)
    rows, operations = [], 6.0 * m * n * k / 1e9
    for (regime, name), taken in times.items():
        seconds = statistics.median(taken)
        ratio = seconds / statistics.median(times[regime, "nn.Linear"])
        rows.append(Row(regime, f"{n}x{k}", m, threads, name, seconds * 1e6, operations / seconds, None, ratio))
    return rows
