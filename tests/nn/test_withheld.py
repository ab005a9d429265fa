"""A packed layer's weight: shape, dtype and device can be asked for, values are an error that names the layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import Model
from torch import Tensor, nn

import qat
from qat import PackedBitLinear


def packed(dtype: torch.dtype = torch.float32) -> PackedBitLinear:
    model = Model().to(dtype)
    qat.convert(model)
    qat.pack(model)
    return model.blocks[1].up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_models_ask_for_is_answered(dtype: torch.dtype) -> None:
    weight = packed(dtype).weight
    assert weight.dtype == weight.data.dtype == dtype and weight.device == torch.device("cpu") and not weight.requires_grad
    assert list(weight.shape) == [12, 8] and weight.numel() == 96 and weight.dim() == weight.ndim == 2 and weight.size(0) == 12
    assert isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_cuda
    assert torch.randn(3, dtype=torch.float64).to(weight).dtype == torch.zeros_like(weight).dtype == dtype
    assert "layer='blocks.1.up'" in repr(weight)


READS: list[Callable[[Tensor], object]] = [
    lambda w: nn.functional.linear(torch.randn(2, 8), w),
    lambda w: torch.randn(2, 8) @ w.t(),
    lambda w: w.data.sum(),
    lambda w: torch.cat([torch.zeros(1, 8), w]),
    lambda w: w.to(torch.float16),
    lambda w: w.clone(),
    lambda w: w.numpy(),
    lambda w: w.tolist(),
    lambda w: w[0, 0].item(),
    lambda w: w.data.normal_(),
    lambda w: copy.deepcopy(w),
    lambda w: w.data_ptr(),
    lambda w: torch.func.vmap(lambda row: row.sum())(w),
]


@pytest.mark.parametrize("read", range(len(READS)))
def test_values_are_an_error_that_names_the_layer(read: int) -> None:
    with pytest.raises(ValueError, match="blocks.1.up: the weight's values were read, but a packed layer has none"):
        READS[read](packed().weight)


def test_copies_states_and_compiled_graphs_do_without_the_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    qat.convert(model)
    qat.pack(model)
    x = torch.randn(2, 8)
    assert list(model.state_dict()) == ["0.packed", "0.weight_scale", "0.bias"]
    assert torch.equal(copy.deepcopy(model)(x), model(x))

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.to(self.inner[0].weight.dtype))

    expected = model(x)
    assert torch.equal(torch.compile(Asks(), fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(Asks(), (x,)).module()(x), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_graph_that_reads_the_values_raises(backend: str) -> None:
    layer, x = packed(), torch.randn(2, 8)

    def ask(x: Tensor) -> Tensor:
        return layer(x.to(layer.weight.dtype) * (layer.weight.shape[0] // 12))

    assert torch.equal(torch.compile(ask, fullgraph=True, backend=backend)(x), layer(x))
    for read in (lambda x: x @ layer.weight.T, lambda x: x + (layer.weight * 2).sin().sum()):
        with pytest.raises(ValueError, match="blocks.1.up: the weight's values were read"):
            torch.compile(read, fullgraph=True, backend=backend)(x)


def test_an_exported_graph_that_reads_the_values_raises() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = packed()

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.layer.weight.T

    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="blocks.1.up: the weight's values were read"):
        torch.export.export(Reads(), (x,)).module()(x)
