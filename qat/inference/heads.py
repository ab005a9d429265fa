"""The output head in full precision at one token: read once at the memory's speed, in half the bytes where that loses nothing.

The head of a small model is most of what a token reads, and torch's matrix products, made for many tokens, read it at half
of the memory's speed or less. Float32 weights that are bfloat16 values, as those of models that were published so, are kept as
these: the products and sums are the same ones of float32 values. torch's own bfloat16 product would round input and output, too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.ops import cpu

_TOKENS = 8  # up to which the rows are read as fast as torch multiplies them
_ROWS = 1024


class RowLinear(nn.Module):
    """nn.Linear for inference, with a float32 or bfloat16 weight [N, K]; x [..., K] -> [..., N] in x's dtype."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if x[..., 0].numel() > _TOKENS:
            return F.linear(x.float(), self.weight.float(), self.bias).to(x.dtype)
        y = torch.ops.qat.cpu_rows(x.float(), self.weight)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class HalfEmbedding(nn.Module):
    """nn.Embedding for inference, with a bfloat16 weight [V, K]; ids [...] -> float32 [..., K]."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., K]."""
        return F.embedding(ids, self.weight).float()


def is_bfloat16(weight: Tensor) -> bool:
    """Whether every value of a float32 matrix is one of bfloat16: the low half of its bits is 0."""
    return not any(bool((rows.contiguous().view(torch.int32) & 0xFFFF).any()) for rows in weight.split(_ROWS))


def stream_head(model: Any, *, half: bool = False) -> str:
    """Make the float32 head of a transformers model a RowLinear, in place; how it is stored then, in words.

    In bfloat16 where nothing is rounded by that, with the embedding that is tied to it, or where `half` wants it. A head that is
    no nn.Linear in float32 on a CPU with compiled kernels stays as it is.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype != torch.float32 or not head.weight.is_cpu or not cpu.compiled():
        return "full head"
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    exact = is_bfloat16(weight)
    if exact or half:
        weight = weight.to(torch.bfloat16)
    if exact and type(embedding) is nn.Embedding and embedding.weight is head.weight and embedding.max_norm is None:
        model.set_input_embeddings(HalfEmbedding(weight))
    model.set_output_embeddings(RowLinear(weight.contiguous(), bias))
    return "full head, as the bfloat16 values that it holds" if exact else "head rounded to bfloat16" if half else "full head"
