"""Gemma 1, 2 and 3: norms store weight - 1, the head is the embedding, some layers see a sliding window in a fixed pattern."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qat.formats.gguf.architectures.record import GELU_TANH, SIZES, Architecture, Settings, gated_settings

_LOCAL_ROPE = 10_000.0  # constants of llama.cpp
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_HANDLES = (SIZES - {"hidden_act"}) | {"hidden_activation", "query_pre_attn_scalar", "layer_types", "sliding_window", *_CAPS}


def _settings(config: Any) -> Settings:
    caps = {key: float(value) for key in _CAPS if (value := getattr(config, key, None))}
    return {**gated_settings(config), **caps, "attention.sliding_window": config.sliding_window}


def _check(config: Any, every: int) -> None:
    """`every`: one layer of so many attends to everything."""
    kind = config.model_type
    if config.query_pre_attn_scalar != config.head_dim:
        raise ValueError(f"query_pre_attn_scalar={config.query_pre_attn_scalar}: llama.cpp scales {kind} by head_dim")
    pattern = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
    if list(config.layer_types) != pattern:
        raise ValueError(f"layer_types of this {kind} model is not the pattern that llama.cpp assumes")


def _check_gemma2(config: Any) -> None:
    _check(config, 2)
    if not all(getattr(config, key, None) for key in _CAPS):
        raise ValueError("llama.cpp caps gemma2's attention and final logits, but this model leaves one of them uncapped")


def _check_gemma3(config: Any) -> None:
    _check(config, 6)
    if any(getattr(config, key, None) for key in _CAPS):
        raise ValueError("llama.cpp does not cap gemma3's logits, but this model does")
    local = config.rope_parameters.get("sliding_attention")
    if local and (local["rope_theta"] != _LOCAL_ROPE or local.get("rope_type", "default") != "default"):
        raise ValueError(f"llama.cpp turns gemma3's sliding layers with base {_LOCAL_ROPE:g}, not with {local}")


GEMMA = Architecture("gemma", GELU_TANH, gated_settings, SIZES | {"hidden_activation"}, norm_offset=1.0, head="tied")
GEMMA2 = replace(GEMMA, name="gemma2", settings=_settings, handles=_HANDLES, check=_check_gemma2)
GEMMA3 = replace(GEMMA2, name="gemma3", check=_check_gemma3)
