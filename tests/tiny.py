"""Models small enough to read, for tests of several modules."""

from __future__ import annotations

import torch
from torch import nn

from qat import BitLinear, PackedBitLinear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    """A language model small enough to read: embedding, two blocks, an output head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 16, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def assert_untouched(model: nn.Module) -> None:
    """No layer was converted."""
    assert not any(isinstance(module, BitLinear | PackedBitLinear) for module in model.modules())
