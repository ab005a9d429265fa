"""Which attention transformers' models call while they train: `qat.ops.attention` where its kernels serve, else torch's.

It takes the place of `sdpa` for as long as a training lasts, and of nothing else: models keep their configuration, what is
evaluated, packed and exported runs torch's attention, and a model that asks for `eager` or another one has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qat.ops.attention import causal_attention, serves

_REPLACED = "sdpa"
_MORE = ("position_bias", "cache", "softcap")
"""What `sdpa` reads beside its named arguments."""


@contextmanager
def narrow_heads() -> Iterator[None]:
    """Models on `sdpa` use the kernels for narrow heads in this context."""
    before = ALL_ATTENTION_FUNCTIONS[_REPLACED]
    ALL_ATTENTION_FUNCTIONS[_REPLACED] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[_REPLACED] = before


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers' `sdpa`: query [B, H, T, D], key and value [B, KV, T, D] -> [B, T, H, D]; no weights."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and causal and not dropout and all(more.get(name) is None for name in _MORE)
    if plain and serves(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_attention(query, key, value, scale).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **more)
