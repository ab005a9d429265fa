"""Each op beside its peers: decode, prefill, both quantizers, the training layer, and a whole model's linears."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu import peers
from benchmarks.gpu.rows import Bench, Peer, Row, shape_of
from benchmarks.gpu.timing import Call
from qat import BitLinear, PackedBitLinear, QuantConfig, ops
from qat.ops import cuda
from qat.ops.options import weight_options
from qat.quantizers.record import WeightOptions

BITNET_2B = [(3840, 2560), (2560, 2560), (13824, 2560), (2560, 6912)]  # qkv, o, gate and up, down: 30 layers of them
WEIGHT_SHAPE, ACTIVATION_SHAPES, TRAINING_SHAPES = (13824, 2560), [(8192, 2560), (8192, 6912)], [(2560, 2560), (13824, 2560)]
BASELINE = "cuBLAS bf16"
COMPILED = ("torch.compile", "AutoBitLinear, online", "AutoBitLinear, offline")
"""How the names of those end that are compiled for seconds at their first call."""
INT_MM_ROWS = 32  # torch._int_mm takes no fewer than 17


def _codes(n: int, k: int, device: torch.device) -> Tensor:
    return torch.randint(-1, 2, (n, k), dtype=torch.int8, device=device)


def _packed(n: int, k: int, layout: str, device: torch.device) -> PackedBitLinear:
    layer = PackedBitLinear(k, n, False, QuantConfig(), layout, device=device)
    layer.packed = ops.pack_ternary(_codes(n, k, device), layout)
    return layer


def linear_peers(bench: Bench, n: int, k: int, m: int, cold: bool) -> dict[str, Peer]:
    """Ours and others on m tokens; cold: each call has its own weight, and all of them outrun the L2 cache."""
    device, bf16 = bench.device, torch.bfloat16
    x, operations = torch.randn(m, k, device=device, dtype=bf16), 2.0 * m * n * k
    x8 = torch.randint(-127, 128, (max(m, INT_MM_ROWS), k), dtype=torch.int8, device=device)

    def weight() -> Tensor:
        return torch.randn(n, k, device=device, dtype=bf16)

    # name -> (one call on a weight of its own, bytes a weight, int8)
    makers = {
        "qat 2bit": (lambda: partial(_packed(n, k, "2bit", device), x), 1 / 4, True),
        "qat base3": (lambda: partial(_packed(n, k, "base3", device), x), 1 / 4, True),  # read as 2bit
        BASELINE: (lambda: partial(F.linear, x, weight()), 2, False),
        f"torch._int_mm, raw, {len(x8)} rows": (lambda: partial(torch._int_mm, x8, _codes(n, k, device).t()), 1, True),
        "fake-quant, torch.compile": (lambda: partial(peers.compiled(peers.fake_quant_linear), x, weight()), 2, False),
        "transformers AutoBitLinear, offline": (
            lambda: partial(peers.auto_bit_linear(n, k, False, device, bf16).requires_grad_(False), x),
            2,
            False,
        ),
    }

    def peer(make: Callable[[], Call], weight_bytes: float, integer: bool) -> Peer:
        count = bench.copies(n * k * weight_bytes) if cold else 1
        return Peer(lambda: [make() for _ in range(count)], n * k * weight_bytes + 2.0 * m * (n + k), operations, integer)

    return {name: replace(peer(*made), late=name.endswith(COMPILED)) for name, made in makers.items()}


def linears(bench: Bench, shapes: Sequence[tuple[int, int]], tokens: Sequence[int], cold_tokens: int = 16) -> list[Row]:
    """Decode (cold weights) up to `cold_tokens` tokens, prefill above."""
    rows = []
    with torch.no_grad():
        for n, k in shapes:
            for m in tokens:
                table = "decode" if m <= cold_tokens else "prefill"
                rows += bench.table(table, shape_of(n, k), m, linear_peers(bench, n, k, m, m <= cold_tokens), BASELINE)
    return rows


def stack(bench: Bench, shapes: Sequence[tuple[int, int]], layers: int, m: int = 1) -> list[Row]:
    """All linears of a model for m tokens as one graph, every layer with weights of its own."""
    device, bf16 = bench.device, torch.bfloat16
    inputs = {k: torch.randn(m, k, device=device, dtype=bf16) for _, k in shapes}

    def chain(calls: list[Call]) -> list[Call]:
        def run() -> None:
            for call in calls:
                call()

        return [run]

    def ours() -> list[Call]:
        return chain([partial(_packed(n, k, "2bit", device), inputs[k]) for _ in range(layers) for n, k in shapes])

    def theirs() -> list[Call]:
        weights = [torch.randn(n, k, device=device, dtype=bf16) for _ in range(layers) for n, k in shapes]
        return chain([partial(F.linear, inputs[w.shape[1]], w) for w in weights])

    weights = layers * sum(n * k for n, k in shapes)
    made = {
        "qat 2bit": Peer(ours, weights / 4, 2.0 * m * weights, True),
        BASELINE: Peer(theirs, 2.0 * weights, 2.0 * m * weights),
    }
    with torch.no_grad():
        return bench.table("stack", f"{layers} layers", m, made, BASELINE)


def activations(bench: Bench, shapes: Sequence[tuple[int, int]]) -> list[Row]:
    """bf16 in, int8 and a scale a token out."""
    rows = []
    for m, k in shapes:
        moved = 3.0 * m * k + 4.0 * m
        inputs = [torch.randn(m, k, device=bench.device, dtype=torch.bfloat16) for _ in range(bench.copies(moved))]
        functions = {
            "qat quantize_activation": ops.quantize_activation,
            "torch, torch.compile": peers.compiled(peers.int8_codes),
            "torch, eager": peers.int8_codes,
        }
        made = {name: Peer(partial(_over, function, inputs), moved) for name, function in functions.items()}
        with torch.no_grad():
            rows += bench.table("activation", shape_of(m, k), m, made, "torch, torch.compile")
    return rows


def _over(function: Call, inputs: list[Tensor]) -> list[Call]:
    return [partial(function, x) for x in inputs]


def weights(bench: Bench, n: int, k: int) -> list[Row]:
    """fp32 in; one scale a tensor takes two reads, one a channel a single one."""
    inputs = [torch.randn(n, k, device=bench.device) for _ in range(bench.copies(4.0 * n * k))]
    made = {}
    for granularity, reads in (("tensor", 2), ("channel", 1)):
        config = QuantConfig(granularity=granularity)
        quantize = partial(_quantize_weight, config=config)
        made[f"qat to int8, a {granularity}"] = Peer(partial(_over, quantize, inputs), (4.0 * reads + 1) * n * k)
        if bench.device.type == "cuda":
            made[f"qat to 2bit, a {granularity}"] = Peer(
                partial(_over, partial(_pack_weight, config=config), inputs), (4.0 * reads + 0.25) * n * k
            )
    made["torch, torch.compile, a tensor"] = Peer(partial(_over, peers.compiled(peers.ternary_codes), inputs), 9.0 * n * k)
    made["torch, eager, a tensor"] = Peer(partial(_over, peers.ternary_codes, inputs), 9.0 * n * k)
    with torch.no_grad():
        return bench.table("weight", shape_of(n, k), 0, made, "torch, torch.compile, a tensor")


def _quantize_weight(w: Tensor, config: QuantConfig) -> object:
    return ops.quantize_weight(w, config)


def _pack_weight(w: Tensor, config: QuantConfig) -> object:
    return torch.ops.qat.cuda_quantize_weight(w, *cuda.weight_arguments(w, WeightOptions(*weight_options(config))), True)


def training_layers(n: int, k: int, device: torch.device) -> dict[str, Callable[[], nn.Module]]:
    """name -> maker; the latent weights are float32, as autocast training has them, but for the baseline's."""
    layers: dict[str, Callable[[], nn.Module]] = {
        BASELINE: lambda: nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16),
        "nn.Linear, fp32 weight, autocast": lambda: nn.Linear(k, n, bias=False, device=device),
    }
    for backward in ("input", "bf16", "int8"):
        config = QuantConfig(backward=backward)
        layers[f"qat backward={backward}"] = partial(BitLinear, k, n, False, config, device=device)
    layers["fake-quant, torch.compile"] = lambda: torch.compile(
        peers.FakeQuantLinear(k, n, bias=False, device=device), dynamic=False
    )
    layers["fake-quant, eager"] = lambda: peers.FakeQuantLinear(k, n, bias=False, device=device)
    layers["transformers AutoBitLinear, online"] = lambda: peers.auto_bit_linear(n, k, True, device, torch.float32)
    return layers


def _training_calls(make: Callable[[], nn.Module], x: Tensor, grad: Tensor) -> list[Call]:
    layer = make()
    operands = [x, *layer.parameters()]

    def step() -> None:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, cache_enabled=False):
            y = layer(x)
        torch.autograd.grad(y, operands, grad)

    return [step]


def training(bench: Bench, shapes: Sequence[tuple[int, int]], m: int) -> list[Row]:
    """Forward and backward of one layer; the input and the gradient are bf16."""
    rows = []
    for n, k in shapes:
        x = torch.randn(m, k, device=bench.device, dtype=torch.bfloat16).requires_grad_()
        grad = torch.randn(m, n, device=bench.device, dtype=torch.bfloat16)
        made = {
            name: Peer(partial(_training_calls, make, x, grad), 0.0, 6.0 * m * n * k, late=name.endswith(COMPILED))
            for name, make in training_layers(n, k, bench.device).items()
        }
        rows += bench.table("training", shape_of(n, k), m, made, BASELINE)
    return rows
