"""GPT-NeoX: q, k and v lie one after another in llama.cpp, where transformers keeps them head by head; RoPE may be partial."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.formats.gguf.architectures.record import GELU_TANH, SIZES, Architecture, Settings, rope, rope_settings, sizes


def _settings(config: Any) -> Settings:
    head_dim = config.hidden_size // config.num_attention_heads
    return {
        **sizes(config, config.intermediate_size),
        "attention.layer_norm_epsilon": config.layer_norm_eps,
        "use_parallel_residual": config.use_parallel_residual,
        "rope.dimension_count": int(head_dim * rope(config).get("partial_rotary_factor", 1.0)),
        **rope_settings(config),
    }


def _check(config: Any) -> None:
    """transformers turns as much as a `head_dim` says, which no head need have."""
    width = config.hidden_size // config.num_attention_heads
    if getattr(config, "head_dim", None) not in (None, width):
        raise ValueError(f"head_dim={config.head_dim} is not done for gguf with gpt_neox, whose heads are {width} wide")


def _three_blocks(name: str, rows: int, config: Any) -> Tensor | None:
    """[heads, (q, k, v), d] to [(q, k, v), heads, d]."""
    if not name.endswith("query_key_value"):
        return None
    return torch.arange(rows).reshape(config.num_attention_heads, 3, -1).swapaxes(0, 1).reshape(-1)


GPT_NEOX = Architecture(
    "gptneox",
    ("gelu", *GELU_TANH),
    _settings,
    SIZES | {"layer_norm_eps", "use_parallel_residual"},
    row_order=_three_blocks,
    check=_check,
    head="own",
    rope_keys=frozenset({"partial_rotary_factor"}),
)
