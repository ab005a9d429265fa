"""GPT-2: LayerNorm, learned positions, plain MLPs."""

from __future__ import annotations

from typing import Any

from qat.formats.gguf.architectures.record import GELU_TANH, Architecture, Settings, sizes

_HANDLES = {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon"}


def _settings(config: Any) -> Settings:
    found = sizes(config, config.n_inner or 4 * config.hidden_size)
    return {**found, "attention.layer_norm_epsilon": config.layer_norm_epsilon}


def _check(config: Any) -> None:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise ValueError("llama.cpp scales GPT-2's attention by 1 / sqrt(head size), and by nothing else")


GPT2 = Architecture("gpt2", GELU_TANH, _settings, frozenset(_HANDLES | {"tie_word_embeddings"}), _check)
