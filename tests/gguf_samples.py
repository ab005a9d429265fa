"""Small random models, block rows and a tokenizer for the tests of GGUF."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import qat
from qat import QuantConfig
from qat.formats.gguf import container as gguf_file
from qat.formats.gguf import writing as gguf
from qat.formats.gguf.blocks import BLOCKS
from qat.formats.llamacpp import questions as llamacpp
from qat.metrics.perplexity import windows

needs_llama_cpp = pytest.mark.skipif(llamacpp.version() is None, reason="llama-cpp-python is not installed: make llama-cpp")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "llama3_rope": (
        "LlamaConfig",
        {
            **SMALL,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "linear_rope": ("LlamaConfig", {**SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "mistral": ("MistralConfig", {**SMALL, "sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**SMALL, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 32}),
    "gemma": ("GemmaConfig", {**SMALL, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 7}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, "tie_word_embeddings": True},
    ),
    "gpt_neox_serial": (
        "GPTNeoXConfig",
        {**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, "use_parallel_residual": False},
    ),
}
IDS = torch.randint(3, 64, (256,), generator=torch.Generator().manual_seed(0))
WINDOWS = list(windows(IDS, 64))


def random_rows(name: str, n: int = 3, blocks: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Codes [n, K] and scales [n, blocks] of the block type."""
    random = np.random.default_rng(0)
    kind = BLOCKS[name]
    t = random.choice(np.array(kind.codes, np.int8), (n, kind.weights * blocks))
    return t, random.uniform(0.01, 2, (n, blocks)).astype(np.float16)


def packed_model(
    name: str = "llama",
    changes: dict[str, object] | None = None,
    include: list[str] | None = None,
    exclude: str | None = None,
    **quant: object,
) -> nn.Module:
    """A random model with weights large enough that attention, norms and biases matter."""
    config_class, config = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**config, **(changes or {})})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            elif "embed" in key or "wte" in key or "wpe" in key:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=0.3 if re.search("q_proj|k_proj", key) else 0.12)
    qat.convert(model, QuantConfig(**quant), include=include, exclude=exclude)  # type: ignore[arg-type]
    qat.pack(model)
    return model


def save(model: nn.Module, file: Path, **options: object) -> dict[str, object]:
    """An export whose embeddings lose nothing."""
    return gguf.save(model, file, **{"floats": "f32", **options})  # type: ignore[arg-type]


def kinds(file: Path) -> dict[str, int]:
    """The type numbers in a file."""
    return {name: tensor.kind for name, tensor in gguf_file.read(file).tensors.items()}


def byte_level(pre_tokenizer: object = None, **special: str) -> object:
    """A byte-level BPE tokenizer with four merges and one special token, id 260."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]
    words = [*alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **(special or {"eos_token": "<|end|>"}))
