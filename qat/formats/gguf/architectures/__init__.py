"""Model architectures of GGUF: the table by transformers' model type, one file a family, and the names of tensors.

A further one is a family's file, a row here, and a row of tests/architectures.py, which tries all of it. Names of tensors come
from the maps of the `gguf` package.
"""

from __future__ import annotations

from typing import Any

from qat.formats.gguf.architectures.gemma import GEMMA, GEMMA2, GEMMA3
from qat.formats.gguf.architectures.gpt2 import GPT2
from qat.formats.gguf.architectures.gpt_neox import GPT_NEOX
from qat.formats.gguf.architectures.llama import LLAMA, MISTRAL
from qat.formats.gguf.architectures.llama import rope_factors as rope_factors
from qat.formats.gguf.architectures.qwen import QWEN2, QWEN3
from qat.formats.gguf.architectures.record import Architecture as Architecture
from qat.formats.gguf.architectures.record import Settings, check_rope, refuse_other_keys

ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
}
_ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function")


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
    found.check(config)
    check_rope(config, found)
    refuse_other_keys(config, found)
    return found


def settings(config: Any) -> Settings:
    """Hyperparameters by GGUF key, without the architecture's prefix, of the config as it is written (with padded widths)."""
    return ARCHITECTURES[config.model_type].settings(config)


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
