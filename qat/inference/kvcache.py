"""A key-value cache whose memory is taken once, for sampling many sequences (`qat.data.selfgen`) and for one (`decode`).

transformers' DynamicCache copies all keys and values at every token (four fifths of the time of a small model at batch 256);
its StaticCache hands attention the whole buffer and a mask. Here a layer fills a buffer and returns a view of what is filled.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class BufferedLayer(DynamicLayer):
    """Keys and values [B, heads, room, dim] of one layer, filled up to `length`."""

    keys: Tensor
    values: Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.length = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory for states like these."""
        keys, values = (x.new_empty(*x.shape[:-2], self.room, x.shape[-1]) for x in (key_states, value_states))
        self.take(keys, values)

    def take(self, keys: Tensor, values: Tensor) -> None:
        """Use these buffers [B, heads, room, dim]."""
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, heads, new, dim]; views of everything so far, [B, heads, total, dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[-2]
        self.keys[..., start:end, :] = key_states
        self.values[..., start:end, :] = value_states
        self.length = end
        return self.keys[..., :end, :], self.values[..., :end, :]

    def get_seq_length(self) -> int:
        """Tokens that are filled."""
        return self.length


def buffered_cache(model: PreTrainedModel, room: int) -> DynamicCache:
    """A cache for `room` tokens; layers of other kinds (sliding window, linear attention) keep transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [BufferedLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
