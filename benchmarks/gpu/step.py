"""The whole training step, forward, backward and AdamW, in tokens a second: QAT beside plain bf16 fine-tuning.

Every variant is the same model from the same seed on the same batch under bf16 autocast, with float32 weights, as
`trainer=gpu` trains. Variants run one after another, each in a model of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import qat
from benchmarks.gpu import peers
from benchmarks.gpu.llama import Llama, Size
from benchmarks.gpu.rows import Bench, Peer, Row
from benchmarks.gpu.timing import Call

PLAIN = "plain bf16"
# name -> (torch.compile, steps in a CUDA graph): how training runs, from what everybody does to what a GPU can do
WAYS = {"eager": (False, 0), "torch.compile": (True, 0), "CUDA graph": (False, 1), "torch.compile, CUDA graph": (True, 1)}


def _replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, make(child))
    return model


def _quantized(model: nn.Module, config: qat.QuantConfig) -> nn.Module:
    qat.convert(model, config)
    return model


def _auto_bit_linear(linear: nn.Linear) -> nn.Module:
    layer = peers.auto_bit_linear(linear.out_features, linear.in_features, True, linear.weight.device, linear.weight.dtype)
    layer.weight = linear.weight
    return layer


def _fake_quant(linear: nn.Linear) -> nn.Module:
    layer = peers.FakeQuantLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    layer.weight = linear.weight
    return layer


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    PLAIN: lambda model: model,
    "qat backward=input": lambda model: _quantized(model, qat.QuantConfig()),
    "qat backward=bf16": lambda model: _quantized(model, qat.QuantConfig(backward="bf16")),
    "qat backward=int8": lambda model: _quantized(model, qat.QuantConfig(backward="int8")),
    "fake-quant": lambda model: _replace(model, _fake_quant),
    "transformers AutoBitLinear": lambda model: _replace(model, _auto_bit_linear),
}


def step(size: Size, change: Callable[[nn.Module], nn.Module], ids: Tensor, compile: bool) -> list[Call]:
    """One call is one optimizer step on the batch."""
    torch.manual_seed(0)
    device = ids.device
    with torch.device(device):
        model = Llama(size, ids.shape[1])
    model = change(model)
    gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=gpu, capturable=gpu)
    loss_of = torch.compile(model, dynamic=False) if compile else model

    def run() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return [run]


def steps(bench: Bench, name: str, size: Size, batch: int, context: int, ways: Sequence[str] = tuple(WAYS)) -> list[Row]:
    """The variants on one model, run in each of these ways; speed against the plain model that runs the same way."""
    ids = torch.randint(size.vocabulary, (batch, context), device=bench.device)
    rows = []
    for way in ways:
        compile, in_graph = WAYS[way]
        made = {f"{variant}, {way}": Peer(partial(step, size, change, ids, compile)) for variant, change in VARIANTS.items()}
        rows += bench.table("step", name, batch * context, made, f"{PLAIN}, {way}", in_graph, rate=True)
    return rows
