"""Qwen 2 (biases in q, k and v) and Qwen 3 (norms of q and k); weights lie as in transformers."""

from __future__ import annotations

from qat.formats.gguf.architectures.llama import refuse_window
from qat.formats.gguf.architectures.record import SIZES, Architecture, gated_settings

_HANDLES = SIZES | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}

QWEN2 = Architecture("qwen2", ("silu",), gated_settings, _HANDLES, refuse_window)
QWEN3 = Architecture("qwen3", ("silu",), gated_settings, _HANDLES, refuse_window)
