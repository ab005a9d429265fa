"""GGUF, one file for llama.cpp and what is built on it (Ollama, LM Studio): the model in its own architecture, and tokenizer.

Types and bytes are in `tensors` and `blocks`, models in `architectures`, the comparison in `read_back`. The
file gets its name only after it was read back and every tensor was found equal to the model's codes times scales.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from qat.conversion.layers import packed_layers, quantized_layers
from qat.conversion.overrides import gathered
from qat.formats.folder import new_file
from qat.formats.gguf import container as gguf_file
from qat.formats.gguf import i2s as gguf_i2s
from qat.formats.gguf import seal, stock
from qat.formats.gguf import tensors as gguf_tensors
from qat.formats.gguf.architectures import Architecture, architecture, settings
from qat.formats.gguf.blocks import BLOCKS
from qat.formats.gguf.read_back import check_tensors, check_tokenizer
from qat.formats.gguf.read_back import read_back as read_back
from qat.formats.gguf.read_back import recorded as recorded
from qat.formats.gguf.read_back import report as report
from qat.formats.gguf.tensors import Source
from qat.formats.gguf.tokenizer import vocabulary
from qat.formats.packed.folder import transformers_config
from qat.formats.packed.manifest import quant_entry
from qat.formats.padding import Padding, plan
from qat.nn.bitlinear import BitLinear
from qat.storage import local

Card = Mapping[str, Any] | Callable[[dict[str, Any]], Mapping[str, Any]]
Choices = dict[str, tuple[str, str]]
_NO_TOKENIZER = {"tokenizer.ggml.model": "no_vocab"}


def unsupported(
    model: nn.Module, tokenizer: Any = None, *, type: str = "auto", floats: str = "f16", pre_tokenizer: str | None = None
) -> str | None:
    """Why the format cannot hold this model (packed, or with BitLinear layers) and tokenizer, or None where it can."""
    try:
        _check_options(type, floats)
        if not quantized_layers(model):
            raise ValueError(f"{model.__class__.__name__} has no quantized layers")
        found, config, padding = _plan(model, type)
        settings(config)
        if tokenizer is not None:
            vocabulary(tokenizer, config.vocab_size, pre_tokenizer)
        for source in gguf_tensors.sources(model, config, found, padding):
            if source.codes is not None:
                gguf_tensors.choose(source, type)
                if type not in gguf_tensors.I2S:
                    source.half_scale()
    except ValueError as error:
        return str(error)
    return None


def save(
    model: nn.Module,
    file: str | Path,
    tokenizer: Any = None,
    *,
    type: str = "auto",
    floats: str = "f16",
    pre_tokenizer: str | None = None,
    card: Card | None = None,
    check: Callable[[Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write a packed model as a GGUF file, and compare every tensor of it with the model.

    Args:
        model: a transformers model with PackedBitLinear layers.
        file: NAME.gguf; replaced if an earlier export wrote it.
        tokenizer: a fast tokenizer; without one, the file takes token ids only.
        type: of the quantized layers: `auto` chooses for each by its shape; else one of `gguf_tensors.TYPES`.
        floats: of embeddings, head and layers that are not quantized: one of `gguf_tensors.FLOATS`. Vectors stay float32.
        pre_tokenizer: llama.cpp's name of the tokenizer's text split, where it is not recognized.
        card: `name`, `base_model`, `license` are written as the file's metadata; a function is called with {} for them.
        check: called with the finished file before it gets its name, such as `read_back`; if it raises, nothing is left.

    Returns:
        {"file", "bytes", "types": lines on which type was chosen and why, "scale_rounding": largest relative change of a scale by
        float16, "padding": one sentence, if MLPs were padded, "verification": what the comparisons found}.

    Raises:
        ValueError: the format cannot hold the model (the reason is named), a foreign file in the way, what was read back
            differs, or the disk refuses.
    """
    _check_options(type, floats)
    target = local(file).absolute()
    _refuse_foreign(target)
    _refuse_unpacked(model)
    found, config, padding = _plan(model, type)
    tensors, choices, rounding = _build(gguf_tensors.sources(model, config, found, padding), type, floats)
    metadata = {
        **_general(model, choices, tensors, {"name": target.stem, **((card({}) if callable(card) else card) or {})}),
        **{f"{found.name}.{key}": value for key, value in settings(config).items()},
        **(_NO_TOKENIZER if tokenizer is None else vocabulary(tokenizer, config.vocab_size, pre_tokenizer)),
    }
    info: dict[str, Any] = {"file": str(file), "types": gguf_tensors.summary(choices), "scale_rounding": rounding}
    info |= {"padding": padding.note()} if padding.added else {}
    with new_file(target) as partial:
        stock.write(partial, found.name, metadata, tensors)
        tensors.clear()
        seal.write_sum(partial)
        info["verification"] = check_tensors(partial, gguf_tensors.sources(model, config, found, padding), type, floats)
        if tokenizer is not None:
            info["verification"] |= check_tokenizer(partial, tokenizer, type)
        info["verification"] |= check(partial) if check else {}
        info["bytes"] = partial.stat().st_size
    return info


def _build(sources: Iterable[Source], type: str, floats: str) -> tuple[dict[str, gguf_file.Tensor], Choices, float]:
    """The tensors, the type of each quantized one and the reason, and the largest relative change of a scale."""
    tensors: dict[str, gguf_file.Tensor] = {}
    choices: Choices = {}
    rounding = 0.0
    for source in sources:
        if source.codes is None:
            tensors[source.name] = gguf_tensors.to_tensor(source, gguf_tensors.float_kind(source, floats))
            continue
        choices[source.name] = gguf_tensors.choose(source, type)
        rounding = max(rounding, 0.0 if type in gguf_tensors.I2S else source.rounding(source.half_scale()))
        tensors[source.name] = gguf_tensors.to_tensor(source, choices[source.name][0])
    return tensors, choices, rounding


def _check_options(type: str, floats: str) -> None:
    if find_spec("gguf") is None:
        raise ValueError("the gguf format needs the package gguf: pip install gguf (it is in the extra: pip install -e .[gguf])")
    for key, value, allowed in (("type", type, gguf_tensors.TYPES), ("floats", floats, tuple(gguf_tensors.FLOATS))):
        if value not in allowed:
            raise ValueError(f"{key}={value!r} is not allowed for gguf; choose one of {', '.join(allowed)}")


def _refuse_foreign(target: Path) -> None:
    if target.suffix != ".gguf":
        raise ValueError(f"{target} does not end in .gguf, by which every reader knows the format")
    if not target.exists():
        return
    try:
        ours = gguf_file.WRITER_KEY in gguf_file.read(target).metadata
    except ValueError:
        ours = False
    if not ours:
        raise ValueError(f"{target} exists and was not written by an export of qat; choose another target or remove it")


def _refuse_unpacked(model: nn.Module) -> None:
    layers = quantized_layers(model)
    unpacked = [name for name, layer in layers.items() if isinstance(layer, BitLinear)]
    if not layers or unpacked:
        reason = f"{unpacked[0]} is not packed yet; call qat.pack first" if unpacked else "it has no quantized layers"
        raise ValueError(f"the gguf format cannot hold this model: {reason}")


def _plan(model: nn.Module, type: str) -> tuple[Architecture, Any, Padding]:
    """The architecture, the config as it is written, and how the MLPs are widened."""
    config = transformers_config(model)
    found = architecture(config)
    for name, layer in quantized_layers(model).items():
        if layer.rms_norm is not None:
            raise ValueError(f"{found.name} in llama.cpp has no place for {name}.rms_norm, the norm of this layer's own input")
        if reason := layer.config.quantizer.unfit("ternary"):
            raise ValueError(f"{name}: quant.weight={layer.config.weight}; {reason}")
        if layer.config.quantizer.bias is not None:
            raise ValueError(f"{name}: quant.weight={layer.config.weight} gives it a bias, for which {found.name} has no room")
        if why := layer.config.needs.get("activations"):
            raise ValueError(f"{name}: {why}; llama.cpp rounds inputs to 8 bits, as they are")
        if layer.config.planes > 1:
            key = "quant.components" if layer.config.components > 1 else f"quant.weight={layer.config.weight}"
            raise ValueError(f"{name} is a sum of {layer.config.planes} ternary matrices ({key}); a block holds one")
    padding = plan(model, config, gguf_tensors.width_multiple(type))
    return found, padding.raise_config(config), padding


def _general(
    model: nn.Module, choices: Choices, tensors: Mapping[str, gguf_file.Tensor], card: Mapping[str, Any]
) -> dict[str, Any]:
    from qat import __version__

    weights: dict[str, int] = {}
    for name, (kind, _) in choices.items():
        rows, width = tensors[name].shape
        weights[kind] = weights.get(kind, 0) + rows * width
    most = max(weights, key=lambda kind: weights[kind])
    quant = quant_entry(gathered({name: layer.config for name, layer in packed_layers(model).items()}))
    facts = {
        "general.type": "model",
        "general.name": card.get("name"),
        "general.license": card.get("license"),
        "general.base_model.count": int("base_model" in card),
        "general.base_model.0.name": card.get("base_model"),
        "general.file_type": gguf_i2s.FTYPE if most in gguf_tensors.I2S else BLOCKS[most].ftype,
        "general.quantization_version": 2,
        gguf_i2s.ORDER_KEY: gguf_tensors.I2S.get(most),
        gguf_file.WRITER_KEY: __version__,
        seal.KEY: seal.UNSET,
        "qat.quant": json.dumps({key: value for key, value in quant.items() if key != "backward"}),
    }
    return {key: value for key, value in facts.items() if value}
