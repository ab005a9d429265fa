"""Model architectures of GGUF: names, hyperparameters, the order of rows. What llama.cpp would compute otherwise is refused.

A model is written in its own architecture, so that any llama.cpp runs it as the model it was. Tensor names come from the maps
of the `gguf` package. Weights lie as in transformers, with two exceptions: `llama` turns RoPE on adjacent pairs, so each head's
rows of q and k are interleaved; `gptneox` keeps q, k and v one after another, where transformers keeps them head by head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Settings = dict[str, Any]
_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_GEMMA3_LOCAL_ROPE = 10_000.0  # constants of llama.cpp
_GEMMA_PATTERN = {"gemma2": 2, "gemma3_text": 6}  # every so many layers, one attends to everything


@dataclass(frozen=True)
class Architecture:
    """How one transformers model type becomes GGUF."""

    name: str
    activations: tuple[str, ...]
    row_order: Callable[[str, int, Any], Tensor | None] = lambda name, rows, config: None
    norm_offset: float = 0.0
    head: str = "any"
    """`any`; `tied`: llama.cpp has no other; `own`: llama.cpp wants the tensor even where it is tied."""


def _interleaved(name: str, rows: int, config: Any) -> Tensor | None:
    """Halves of a head (x_i, x_i+d/2) to pairs: new row 2i is old row i, 2i + 1 is i + d/2."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    return None if heads is None else torch.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _three_blocks(name: str, rows: int, config: Any) -> Tensor | None:
    """[heads, (q, k, v), d] to [(q, k, v), heads, d]."""
    if not name.endswith("query_key_value"):
        return None
    return torch.arange(rows).reshape(config.num_attention_heads, 3, -1).swapaxes(0, 1).reshape(-1)


ARCHITECTURES = {
    "llama": Architecture("llama", ("silu",), _interleaved),
    "mistral": Architecture("llama", ("silu",), _interleaved),
    "qwen2": Architecture("qwen2", ("silu",)),
    "qwen3": Architecture("qwen3", ("silu",)),
    "gemma": Architecture("gemma", _GELU_TANH, norm_offset=1.0, head="tied"),
    "gemma2": Architecture("gemma2", _GELU_TANH, norm_offset=1.0, head="tied"),
    "gemma3_text": Architecture("gemma3", _GELU_TANH, norm_offset=1.0, head="tied"),
    "gpt2": Architecture("gpt2", _GELU_TANH),
    "gpt_neox": Architecture("gptneox", ("gelu", *_GELU_TANH), _three_blocks, head="own"),
}


def architecture(config: Any) -> Architecture:
    """The architecture of a transformers config.

    Raises:
        ValueError: it is not done, or llama.cpp would compute something else; the reason is named.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type {kind!r} is not done for gguf; done are {', '.join(ARCHITECTURES)}")
    found = ARCHITECTURES[kind]
    activation = next((a for key in _ACTIVATION_KEYS if (a := getattr(config, key, None))), None)
    if activation not in found.activations:
        raise ValueError(f"llama.cpp computes {found.name} with {found.activations[0]}, not with {activation}")
    if found.head == "tied" and not config.tie_word_embeddings:
        raise ValueError(f"llama.cpp ties the head of {found.name} to its embedding, but this model has its own")
    _check_attention(config)
    return found


_ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function")
_MLP_KEYS = ("intermediate_size", "n_inner")


def _check_attention(config: Any) -> None:
    kind, layers = config.model_type, config.num_hidden_layers
    if kind in ("gemma2", "gemma3_text"):
        if config.query_pre_attn_scalar != config.head_dim:
            raise ValueError(f"query_pre_attn_scalar={config.query_pre_attn_scalar}: llama.cpp scales {kind} by head_dim")
        every = _GEMMA_PATTERN[kind]
        wanted = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
        if list(config.layer_types) != wanted:
            raise ValueError(f"layer_types of this {kind} model is not the pattern that llama.cpp assumes")
    elif _slides(config):
        raise ValueError(f"llama.cpp has no sliding window of {config.sliding_window} tokens for {kind}")
    if getattr(config, "attention_bias", False) and kind not in ("llama", "gpt_neox"):
        raise ValueError(f"llama.cpp's {kind} has no biases in q, k, v and o, but this model does")
    if kind == "gpt2" and (config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights):
        raise ValueError("llama.cpp scales GPT-2's attention by 1 / sqrt(head size), and by nothing else")


def _slides(config: Any) -> bool:
    window = getattr(config, "sliding_window", None)
    return bool(window) and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings


def settings(config: Any) -> Settings:
    """Hyperparameters by GGUF key, without the architecture's prefix, of the config as it is written (with padded widths).

    Raises:
        ValueError: a kind of RoPE scaling that is not done.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    values: Settings = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": hidden,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": next((n for key in _MLP_KEYS if (n := getattr(config, key, None))), 4 * hidden),
        "attention.head_count": heads,
    }
    if config.model_type == "gpt2":
        return {**values, "attention.layer_norm_epsilon": config.layer_norm_epsilon}
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    if config.model_type == "gpt_neox":
        values |= {
            "attention.layer_norm_epsilon": config.layer_norm_eps,
            "use_parallel_residual": config.use_parallel_residual,
            "rope.dimension_count": int(head_dim * _rope(config).get("partial_rotary_factor", 1.0)),
        }
    else:
        values |= {
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "rope.dimension_count": head_dim,
        }
    return {**values, **_rope_settings(config), **_gemma_settings(config)}


def _rope(config: Any) -> dict[str, Any]:
    """The RoPE parameters of the layers that attend to everything."""
    found = config.rope_parameters
    return found.get("full_attention", found)


def _rope_settings(config: Any) -> Settings:
    rope = _rope(config)
    values: Settings = {"rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind != "default" and not (kind == "llama3" and ARCHITECTURES[config.model_type].name == "llama"):
        raise ValueError(
            f"rope_type {kind!r} is not done for gguf with {config.model_type}; done are default, linear and Llama's llama3"
        )
    local = config.rope_parameters.get("sliding_attention")
    if local and (local["rope_theta"] != _GEMMA3_LOCAL_ROPE or local.get("rope_type", "default") != "default"):
        raise ValueError(f"llama.cpp turns gemma3's sliding layers with base {_GEMMA3_LOCAL_ROPE:g}, not with {local}")
    return values


def _gemma_settings(config: Any) -> Settings:
    if config.model_type not in _GEMMA_PATTERN:
        return {}
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    found = {key: float(value) for key in caps if (value := getattr(config, key, None))}
    if config.model_type == "gemma2" and len(found) < 2:
        raise ValueError("llama.cpp caps gemma2's attention and final logits, but this model leaves one of them uncapped")
    if config.model_type == "gemma3_text" and found:
        raise ValueError("llama.cpp does not cap gemma3's logits, but this model does")
    return {**found, "attention.sliding_window": config.sliding_window}


def rope_factors(config: Any) -> Tensor | None:
    """float32 [head_dim / 2] by which llama.cpp divides the frequencies (Llama 3.1 on); None where RoPE is not scaled so."""
    if getattr(config, "rope_parameters", None) is None or _rope(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    plain = float(_rope(config)["rope_theta"]) ** -exponents
    return (plain / scaled.double()).float()


class Names:
    """Names of tensors in GGUF, from transformers' names."""

    def __init__(self, found: Architecture, layers: int) -> None:
        import gguf

        number = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[found.name]
        self._map = gguf.get_tensor_name_map(number, layers)
        self._architecture = found.name

    def __getitem__(self, name: str) -> str:
        """The name of a tensor `a.b.weight` or `a.b.bias`; ValueError where llama.cpp's model has no such tensor."""
        found = self._map.get_name(name, (".weight", ".bias"))
        if found is None:
            raise ValueError(f"{self._architecture} in llama.cpp has no place for {name}")
        return found
