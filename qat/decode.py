"""One sequence, token by token: prefill, then steps of one token over a cache that is allocated once.

transformers' own growing cache copies all keys and values at every token, its static one makes attention read the whole room
at every token. Here the room is allocated once and attention gets a view of what is filled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RoomyLayer(DynamicLayer):
    """Keys and values [B, H, room, D] of one layer, filled up to `length`."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.length = room, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, H, T, D]; views of everything up to there."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            batch, heads, _, width = key_states.shape
            self.keys = key_states.new_zeros(batch, heads, self.room, width)
            self.values = value_states.new_zeros(batch, heads, self.room, value_states.shape[-1])
            self.is_initialized = True
        start, end = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens that are filled."""
        return self.length


class Decoder:
    """A causal language model, and what it has read so far."""

    def __init__(self, model: PreTrainedModel, room: int) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in self.cache.layers]

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """Logits [V] after the further tokens int64 [T]."""
        output: Any = self.model(input_ids=ids[None], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1]


def greedy(decoder: Decoder, prompt: Tensor, count: int) -> Tensor:
    """The `count` likeliest tokens int64 after the prompt int64 [T], one by one."""
    logits, tokens = decoder.read(prompt), []
    for _ in range(count):
        tokens.append(logits.argmax()[None])
        if len(tokens) < count:
            logits = decoder.read(tokens[-1])
    return torch.cat(tokens)
