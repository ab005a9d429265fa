"""What can be merged and is put over a BitLinear is said, once a kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.nn import wrapping


class Adapter(nn.Module):
    """As peft's: the layer below, and a low-rank sum beside it."""

    def __init__(self, below: nn.Linear) -> None:
        super().__init__()
        self.base_layer = below
        self.down, self.up = nn.Linear(below.in_features, 2, False), nn.Linear(2, below.out_features, False)

    def merge(self) -> None:
        self.base_layer.weight.data += self.up.weight @ self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Block(nn.Module):
    """Not to be merged."""

    def __init__(self, below: nn.Module) -> None:
        super().__init__()
        self.below = below


def test_an_adapter_over_a_bitlinear_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    wrapping._say.cache_clear()
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    Adapter(model[0])
    qat.convert(model)
    Block(model[0])
    assert "wraps" not in capsys.readouterr().err
    wrapped = [Adapter(layer) for layer in model]
    said = [line for line in capsys.readouterr().err.splitlines() if "wraps a BitLinear" in line]
    assert len(said) == 1 and "test_wrapping.Adapter" in said[0]
    x = torch.randn(4, 32)
    before = wrapped[0](x)
    wrapped[0].merge()
    assert not torch.allclose(wrapped[0].base_layer(x), before, rtol=0.05)  # why it is said
