"""Before any time: are the results those of the reference, and does a chain of overlapping launches compute what others do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu.rows import Bench, Peer, Row, line, shape_of
from benchmarks.gpu.timing import Call
from qat import BitLinear, PackedBitLinear, QuantConfig, ops

WAITING, OVERLAPPING = "each waits for the one ahead", "launched ahead"


def compared(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
    """In words."""
    pairs = list(zip(found, wanted, strict=True))
    if any(one.dtype != other.dtype or one.shape != other.shape for one, other in pairs):
        return "WRONG: another dtype or shape"
    wrong, count = sum(int((one != other).sum()) for one, other in pairs), sum(one.numel() for one, _ in pairs)
    if not wrong:
        return f"equal to the bit, {count} values"
    most = max(float((one.double() - other.double()).abs().max()) for one, other in pairs)
    return f"WRONG: {wrong} of {count} values differ, by up to {most:.3g}"


def _row(table: str, shape: str, tokens: int, what: str, compare: Callable[[], str]) -> Row:
    """A comparison that fails is a row that says so."""
    row = Row(table, shape, tokens, what)
    try:
        row.note = compare()
    except Exception as error:  # the next is looked at all the same
        row.note = f"failed: {str(error).strip().partition(chr(10))[0][:120] or type(error).__name__}"
    print(line(row), flush=True)
    return row


def _layers(bench: Bench, n: int, k: int) -> tuple[BitLinear, BitLinear]:
    """One weight: by the kernels, and by the reference."""
    ours, theirs = (BitLinear(k, n, False, QuantConfig(kernels=name), device=bench.device) for name in ("auto", "reference"))
    theirs.weight = ours.weight
    return ours, theirs


def _packed(bench: Bench, n: int, k: int, m: int) -> str:
    ours, theirs = _layers(bench, n, k)
    x, codes = torch.randn(m, k, device=bench.device, dtype=torch.bfloat16), ours.quantized()
    with torch.no_grad():
        return compared(*([PackedBitLinear.from_bitlinear(one, quantized=codes)(x)] for one in (ours, theirs)))


def _passes(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


def _trained(bench: Bench, n: int, k: int, m: int) -> str:
    x = torch.randn(m, k, device=bench.device, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(m, n, device=bench.device, dtype=torch.bfloat16)
    return compared(*(_passes(layer, x, grad) for layer in _layers(bench, n, k)))


def reference(bench: Bench, shapes: Sequence[tuple[int, int]], tokens: Sequence[int], trained: int) -> list[Row]:
    """Packed layers and a training layer, forward and backward, beside pure torch on the same device."""
    for n, k in shapes:
        for m in tokens:
            bench.done.append(_row("reference", shape_of(n, k), m, "packed layer", partial(_packed, bench, n, k, m)))
        bench.done.append(_row("reference", shape_of(n, k), trained, "training layer", partial(_trained, bench, n, k, trained)))
    return bench.done


def _chain(bench: Bench, width: int, layers: int) -> Callable[[Tensor, bool], Tensor]:
    """x, and whether launches overlap -> what the last of the layers gives, each with weights of its own."""
    made = []
    for _ in range(layers):
        t = torch.randint(-1, 2, (width, width), dtype=torch.int8, device=bench.device)
        made.append((ops.pack_ternary(t, "2bit"), torch.full((1, 1), width**-0.5, device=bench.device)))

    def run(x: Tensor, overlap: bool) -> Tensor:
        for packed, scale in made:
            if x.is_cuda:
                x = torch.ops.qat.cuda_packed_linear(x, packed, scale, None, width, False, 1e-5, overlap)
            else:
                x = ops.packed_linear(x, packed, scale, in_features=width)
        return x

    return run


def _captured(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """The chain in a graph on a GPU, where nothing but the graph's own edges keeps its order."""
    if not x.is_cuda:
        return lambda: run(x)
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run(x)

    def replayed() -> Tensor:
        graph.replay()
        return kept.clone()

    return replayed


def _chained(bench: Bench, width: int, layers: int, inputs: int, captured: bool) -> str:
    run = _chain(bench, width, layers)
    values = torch.randn(inputs, 1, width, device=bench.device, dtype=torch.bfloat16)
    x = torch.zeros_like(values[0])
    ahead: Callable[[], Tensor] = partial(run, x, True)
    if captured:
        ahead = _captured(lambda x: run(x, True), x)
    found = []
    with torch.no_grad():
        for value in values:
            x.copy_(value)
            found.append(ahead())
        wanted = [run(value, False) for value in values]
    return compared(found, wanted)


def chain(bench: Bench, widths: Sequence[int], layers: int, inputs: int) -> list[Row]:
    """Overlapping launches against waiting ones: the same bits, eager and captured; then their times."""
    for width in widths:
        for captured in (False, True):
            what = f"{layers} layers, {inputs} inputs, {'captured' if captured else 'eager'}"
            compare = partial(_chained, bench, width, layers, inputs, captured)
            bench.done.append(_row("chain", shape_of(width, width), 1, what, compare))
    for width in widths:
        with torch.no_grad():
            bench.table("chain", shape_of(width, width), 1, _peers(bench, width, layers), WAITING, in_graph=1)
    return bench.done


def _peers(bench: Bench, width: int, layers: int) -> dict[str, Peer]:
    x = torch.randn(1, width, device=bench.device, dtype=torch.bfloat16)

    def calls(overlap: bool) -> list[Call]:
        return [partial(_chain(bench, width, layers), x, overlap)]

    moved = layers * (width * width / 4 + 4.0 * width)
    return {name: Peer(partial(calls, name == OVERLAPPING), moved) for name in (WAITING, OVERLAPPING)}


def profile(bench: Bench, n: int, k: int, tokens: Sequence[int]) -> list[Row]:
    """What one packed layer spends in each kernel, by torch's profiler: a row a kernel."""
    activity = torch.profiler.ProfilerActivity
    wanted = [activity.CUDA] if bench.device.type == "cuda" else [activity.CPU]
    layer = PackedBitLinear.from_bitlinear(BitLinear(k, n, False, QuantConfig(), device=bench.device))
    for m in tokens:
        x = torch.randn(m, k, device=bench.device, dtype=torch.bfloat16)
        with torch.no_grad():
            layer(x)
            with torch.profiler.profile(activities=wanted) as found:
                for _ in range(10):
                    layer(x)
        for one in sorted(found.key_averages(), key=_time_of, reverse=True)[:4]:
            row = Row("profile", shape_of(n, k), m, one.key[:38], _time_of(one) / one.count, "each", note=f"{one.count} calls")
            print(line(row), flush=True)
            bench.done.append(row)
    return bench.done


def _time_of(event: torch.autograd.profiler_util.FunctionEventAvg) -> float:
    return float(event.self_device_time_total or event.self_cpu_time_total)
