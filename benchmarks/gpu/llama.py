"""A Llama in plain torch, with random weights: what the training step is measured on, whatever else is installed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """The shape of a model; the head is tied to the embedding."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int


SIZES = {
    "SmolLM2-135M": Size(49152, 576, 30, 9, 3, 1536),
    "SmolLM2-360M": Size(49152, 960, 32, 15, 5, 2560),
    "Llama-3.2-1B": Size(128256, 2048, 16, 32, 8, 8192),
}


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], -1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.width = size.hidden // size.heads
        self.q_proj = nn.Linear(size.hidden, size.heads * self.width, bias=False)
        self.k_proj = nn.Linear(size.hidden, size.kv_heads * self.width, bias=False)
        self.v_proj = nn.Linear(size.hidden, size.kv_heads * self.width, bias=False)
        self.o_proj = nn.Linear(size.heads * self.width, size.hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(
            _rotate(q, cosine, sine).to(v.dtype), _rotate(k, cosine, sine).to(v.dtype), v, is_causal=True, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention and SwiGLU, each after an RMS norm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention, self.attention_norm, self.mlp_norm = Attention(size), nn.RMSNorm(size.hidden), nn.RMSNorm(size.hidden)
        self.gate_proj = nn.Linear(size.hidden, size.mlp, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.mlp, bias=False)
        self.down_proj = nn.Linear(size.mlp, size.hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cosine, sine)
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    """Token ids [B, T] to the mean cross-entropy of the next ones."""

    def __init__(self, size: Size, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks, self.norm = nn.ModuleList(Block(size) for _ in range(size.layers)), nn.RMSNorm(size.hidden)
        width = size.hidden // size.heads
        angles = torch.arange(context)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cosine[: ids.shape[1]], self.sine[: ids.shape[1]])
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
