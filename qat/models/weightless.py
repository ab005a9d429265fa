"""A model of any size without its weights: built from its configuration alone, of fake tensors that have shapes and no values.

Parameters are made on the meta device, so that 70 billion take no memory, and then become torch's fake tensors, which run any
forward pass by shapes. What autograd would save is then counted as it is for a real model, instead of by formulas for each
architecture. A mask is left out where a run has none: transformers makes one for tensors whose values it cannot read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from qat.config import ModelConfig
from qat.models.hub import config_of
from qat.models.source import resolve

_LLAMA = {
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "34b": (8192, 22016, 48, 64, 8, 32000),
    "70b": (8192, 28672, 80, 64, 8, 128256),
}
"""Size -> hidden size, width of the MLP, layers, heads, key and value heads, vocabulary: Llama's of 2, 3 and 3.2."""
_TIED = ("1b", "3b")
_SIZE = re.compile(r"\d+(\.\d+)?[kmbtx]", re.IGNORECASE)
"""What is meant as a size, in the table or not: no name that a model has."""


def size_named(name: str) -> Any:
    """The configuration of a Llama of that size (`7b`); None where the name is no size, or a file has it.

    Raises:
        ValueError: a size that is not in the table.
    """
    if Path(name).exists() or not _SIZE.fullmatch(name):
        return None
    if name.lower() not in _LLAMA:
        raise ValueError(f"model.path={name}: of models named by their size alone there are {', '.join(_LLAMA)}")
    hidden, width, layers, heads, kv, vocabulary = _LLAMA[name.lower()]
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }
    heads_of: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": 131072}
    return LlamaConfig(**sizes, **heads_of, tie_word_embeddings=name.lower() in _TIED)


def weightless(config: ModelConfig, path: str | None = None) -> nn.Module:
    """The model that `path` (default `config.path`) means, on the meta device; a folder needs no more than its config.json.

    Raises:
        ValueError: there is no such model, or transformers knows no causal language model of its kind.
    """
    name = path or config.path
    sizes = size_named(name) or config_of(config, resolve(name))
    if getattr(sizes, "quantization_config", None) is not None:
        raise ValueError(f"{name} is already quantized; give the full-precision checkpoint")
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                sizes, dtype=torch.float32, trust_remote_code=config.trust_remote_code
            )
    except Exception as error:  # transformers raises nearly any class here
        raise ValueError(f"cannot build {name} from its configuration: {' '.join(str(error).split())}") from error
    return model


@contextmanager
def faked(model: nn.Module) -> Iterator[nn.Module]:
    """Within, a model on the meta device has fake tensors on the CPU, and so has whatever is made."""
    mode, before = FakeTensorMode(allow_non_fake_inputs=True), dict(ALL_MASK_ATTENTION_FUNCTIONS)
    for name in ("sdpa", "flash_attention_2"):
        ALL_MASK_ATTENTION_FUNCTIONS[name] = _no_mask
    try:
        with mode:
            yield model.to_empty(device="cpu")
    finally:
        for name in ("sdpa", "flash_attention_2"):
            ALL_MASK_ATTENTION_FUNCTIONS[name] = before[name]


def _no_mask(*_: Any, **__: Any) -> None:
    """Causal attention without padding needs none."""
