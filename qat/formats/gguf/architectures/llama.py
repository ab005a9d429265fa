"""Llama and Mistral: llama.cpp's `llama` turns RoPE on adjacent pairs, so each head's rows of q and k are interleaved.

Llama 3's scaled RoPE is a tensor of the file (`rope_factors`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qat.formats.gguf.architectures.record import SIZES, Architecture, gated_settings, interleaved, rope, slides


def rope_factors(config: Any) -> Tensor | None:
    """float32 [head_dim / 2] by which llama.cpp divides the frequencies (Llama 3.1 on); None where RoPE is not scaled so."""
    if getattr(config, "rope_parameters", None) is None or rope(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    plain = float(rope(config)["rope_theta"]) ** -exponents
    return (plain / scaled.double()).float()


def refuse_window(config: Any) -> None:
    """ValueError for a sliding window, which llama.cpp has for other architectures only."""
    if slides(config):
        raise ValueError(f"llama.cpp has no sliding window of {config.sliding_window} tokens for {config.model_type}")


LLAMA = Architecture(
    "llama",
    ("silu",),
    gated_settings,
    SIZES | {"attention_bias", "mlp_bias"},
    row_order=interleaved,
    scaled_rope=("linear", "llama3"),
)
MISTRAL = replace(LLAMA, handles=SIZES | {"sliding_window", "layer_types"}, check=refuse_window)
