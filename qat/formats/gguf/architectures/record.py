"""How one transformers model type becomes GGUF, as a record; and what the families have in common.

A model is written in its own architecture, so that any llama.cpp runs it as the model it was. What llama.cpp would compute
otherwise is refused, by allowing: a key of the configuration may differ from its class's default only where the record handles
it, or where it is known to change no number of a forward pass. Keys that the class does not declare are read by no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Settings = dict[str, Any]
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
SIZES = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    | {"head_dim", "max_position_embeddings", "tie_word_embeddings", "hidden_act", "rms_norm_eps", "rope_parameters"}
)
"""Keys that `gated_settings`, and the checks of `architecture`, handle for every family with RMSNorm and gated MLPs."""
HARMLESS = frozenset(
    {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache"}
    | {"initializer_range", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "is_decoder"}
    | {"return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type", "tokenizer_class"}
    | {"chunk_size_feed_forward", "attention_dropout", "hidden_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop"}
    | {"attn_pdrop", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"}
    | {"n_ctx", "task_specific_params", "use_bfloat16", "reorder_and_upcast_attn", "begin_suppress_tokens"}
)
"""Keys that change no logit of a causal language model in eval mode."""


@dataclass(frozen=True)
class Architecture:
    """A row of the table."""

    name: str
    """llama.cpp's."""
    activations: tuple[str, ...]
    """Names in transformers of the one that llama.cpp computes."""
    settings: Callable[[Any], Settings]
    """Hyperparameters by GGUF key, without the architecture's prefix, of a config."""
    handles: frozenset[str] = SIZES
    """Keys of the config that `settings` and `check` take care of."""
    check: Callable[[Any], None] = lambda config: None
    """ValueError where llama.cpp would compute something else."""
    row_order: Callable[[str, int, Any], Tensor | None] = lambda name, rows, config: None
    """The order in which a layer's rows are written; None: as they are."""
    norm_offset: float = 0.0
    """Added to the norms' weights."""
    head: str = "any"
    """`any`; `tied`: llama.cpp has no other; `own`: llama.cpp wants the tensor even where it is tied."""
    scaled_rope: tuple[str, ...] = ("linear",)
    """Kinds of RoPE scaling beside none."""
    rope_keys: frozenset[str] = frozenset()
    """Further keys of `rope_parameters` that `settings` handles."""


_UNDECLARED = {"is_causal": True}
"""What transformers asks any config for, whether or not its class declares it."""


def refuse_other_keys(config: Any, found: Architecture) -> None:
    """ValueError for a key with another value than its class's default that nobody here takes care of."""
    defaults = _UNDECLARED | type(config)().to_dict()
    for key, value in config.to_dict().items():
        free = key in HARMLESS or key in found.handles or key.startswith("_") or key not in defaults
        if not free and value != defaults[key]:
            raise ValueError(
                f"{key}={value!r} is not done for gguf with {config.model_type}: llama.cpp's {found.name} computes with"
                f" {defaults[key]!r}"
            )


def gated_settings(config: Any) -> Settings:
    """Of a model with RMSNorm, rotary embeddings and gated MLPs."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        **sizes(config, config.intermediate_size),
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        **rope_settings(config),
    }


def sizes(config: Any, feed_forward: int) -> Settings:
    """Those that every architecture has."""
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": feed_forward,
        "attention.head_count": config.num_attention_heads,
    }


def rope(config: Any) -> dict[str, Any]:
    """The RoPE parameters of the layers that attend to everything."""
    found = config.rope_parameters
    return found.get("full_attention", found)


def rope_settings(config: Any) -> Settings:
    """Base and linear scaling."""
    found = rope(config)
    values: Settings = {"rope.freq_base": float(found["rope_theta"])}
    if found.get("rope_type", "default") == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(found["factor"])}
    return values


_ROPE_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


def check_rope(config: Any, found: Architecture) -> None:
    """ValueError for a scaling, or a parameter of it, that is not done."""
    if getattr(config, "rope_parameters", None) is None:
        return
    given = rope(config)
    kind = given.get("rope_type", "default")
    if kind != "default" and kind not in found.scaled_rope:
        allowed = ", ".join(("default", *found.scaled_rope))
        raise ValueError(f"rope_type {kind!r} is not done for gguf with {config.model_type}; done are {allowed}")
    neutral = {"partial_rotary_factor": 1.0, "type": kind}
    for key in given.keys() - {"rope_theta", "rope_type"} - _ROPE_KEYS[kind] - found.rope_keys:
        if given[key] not in (None, neutral.get(key)):
            raise ValueError(f"rope_parameters.{key}={given[key]!r} is not done for gguf with {config.model_type}")


def slides(config: Any) -> bool:
    """Whether some layer sees less than the whole context."""
    window = getattr(config, "sliding_window", None)
    some = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return bool(window) and some and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings


def interleaved(name: str, rows: int, config: Any) -> Tensor | None:
    """Halves of a head (x_i, x_i+d/2) to pairs, for RoPE that turns those: new row 2i is old row i, 2i + 1 is i + d/2."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    return None if heads is None else torch.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
