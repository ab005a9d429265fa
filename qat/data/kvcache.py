"""A key-value cache whose memory is taken once.

transformers' DynamicCache copies all keys and values at every token (four fifths of the time of a small model at batch 256);
its StaticCache hands attention the whole buffer and a mask. Here a layer fills a buffer and returns a view of what is filled.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class BufferedLayer(DynamicLayer):
    """A layer for at most `length` tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.key_buffer = key_states.new_empty(*key_states.shape[:-2], self.length, key_states.shape[-1])
        self.value_buffer = value_states.new_empty(*value_states.shape[:-2], self.length, value_states.shape[-1])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, new, dim] and return everything so far, [B, heads, total, dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        self.key_buffer[..., start:stop, :] = key_states
        self.value_buffer[..., start:stop, :] = value_states
        self.keys, self.values = self.key_buffer[..., :stop, :], self.value_buffer[..., :stop, :]
        return self.keys, self.values


def buffered_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """A cache for `length` tokens; layers of other kinds (sliding window, linear attention) keep transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [BufferedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
