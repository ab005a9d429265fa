"""Our own folder: one safetensors file that says all about itself, and the transformers config and tokenizer beside it.

Written for every run, because it holds what no stock format can (groups, channels, binary, base-3, any width). Metadata of
`packed.safetensors` (by that name, so that stock transformers refuses the folder instead of loading
random weights): format "qat-packed", version, `conversion` (the record that rebuilds the layers), `widths` (the unpadded
in_features of every packed layer, which its bytes do not tell) and `parameters` (of the full-precision model, tied ones once).
The file never depends on the machine: `kernels` is written as auto.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialize
from torch import nn

from qat.bitlinear import BitLinear, PackedBitLinear
from qat.conversion import Conversion
from qat.export.folder import PACKED_WEIGHTS, WRITER, new_folder, one_line, read_metadata
from qat.export.tensors import (
    byte_count,
    check_tensors,
    full_precision_bf16,
    packed_layers,
    parameter_count,
    unique_tensors,
)

FORMAT, VERSION = "qat-packed", "1"


def save(
    model: nn.Module,
    folder: str | Path,
    record: Conversion | None = None,
    tokenizer: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a packed transformers model: packed.safetensors, config.json, generation config and tokenizer.

    Args:
        model: with PackedBitLinear layers (`qat.pack`).
        folder: replaced if an earlier export wrote it.
        record: of `convert` or `pack`; the reasons of skipped layers are taken from it.
        tokenizer: any object with `save_pretrained`.
        extra: further JSON-able facts, kept in the file's metadata. Its "card" is the model card's of a later export.

    Raises:
        ValueError: nothing is packed, no transformers config, a foreign target, or the disk refuses.
    """
    config = transformers_config(model)
    with new_folder(folder) as partial:
        save_state(model, partial / PACKED_WEIGHTS, record, extra)
        save_config(model, config, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return Path(folder)


def load(folder: str | Path) -> nn.Module:
    """The packed model of a folder, rebuilt with transformers: float32, eval mode, on the CPU.

    Raises:
        ValueError: not such a folder, unknown version, truncated or wrong contents; the file is named.
    """
    from transformers import AutoConfig

    file = Path(folder) / PACKED_WEIGHTS
    read_record(file)
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises nearly any class here
        raise ValueError(f"{Path(folder) / 'config.json'} is not a transformers config: {one_line(error)}") from error
    model = empty_model(config)
    load_state(model, file)
    return model.eval()


def is_packed(folder: str | Path) -> bool:
    """Whether `folder` holds a packed model of ours."""
    try:
        return read_metadata(Path(folder) / PACKED_WEIGHTS).get("format") == FORMAT
    except ValueError:
        return False


def transformers_config(model: nn.Module) -> Any:
    """The model's transformers config, or ValueError."""
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type") or not hasattr(config, "save_pretrained"):
        raise ValueError(f"{type(model).__name__} has no transformers config; save_state writes any module's tensors")
    return config


def save_config(model: nn.Module, config: Any, folder: Path) -> None:
    """config.json (naming the model's class) and generation_config.json."""
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")  # save_pretrained refuses what many models ship


def empty_model(config: Any, device: str = "cpu") -> nn.Module:
    """A float32 model of a transformers config with uninitialized weights; `meta` costs no memory.

    Raises ValueError for an architecture that transformers cannot build as a causal language model.
    """
    import transformers
    from transformers.initialization import no_init_weights

    named = getattr(transformers, (config.architectures or [""])[0], None)
    try:
        with torch.device(device), no_init_weights():
            if isinstance(named, type) and hasattr(named, "_from_config"):
                model = named._from_config(config, dtype=torch.float32)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.tie_weights()  # no_init_weights leaves it out
    except Exception as error:
        raise ValueError(f"transformers cannot build a {config.model_type} model: {one_line(error)}") from error
    return model


def save_state(
    model: nn.Module, file: str | Path, record: Conversion | None = None, extra: Mapping[str, Any] | None = None
) -> None:
    """Write the tensors of any module with PackedBitLinear layers, tied ones once; arguments as in `save`.

    The file appears whole or not at all: safetensors writes it under a temporary name.
    """
    metadata = _metadata(model, record, extra)
    try:
        save_file(unique_tensors(model), file, metadata)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {file}: {error}") from error


def load_state(model: nn.Module, file: str | Path) -> Conversion:
    """Put the file's packed layers into a fresh, unconverted `model`, load every tensor, and return the record.

    Raises:
        ValueError: naming the file: not of this format, unknown version, truncated, a missing, unexpected or misshapen
            tensor, a byte that holds no codes, or a record that does not fit the model.
    """
    file = Path(file)
    record, widths = read_record(file)
    try:
        tensors = load_file(file)
        record.apply(model)
        _check_widths(model, widths)
        check_tensors(model, tensors)
        model.load_state_dict(tensors, strict=False)
    except (ValueError, RuntimeError, SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {one_line(error)}") from error
    return record


def read_record(file: Path) -> tuple[Conversion, dict[str, int]]:
    """The conversion record and the widths from a file's metadata; ValueError for another format or version."""
    metadata = read_metadata(file)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{file} is not a packed model of qat: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{file} has version {metadata.get('version')!r} of {FORMAT}; this qat reads version {VERSION!r}")
    try:
        record, widths = Conversion.from_json(metadata["conversion"]), json.loads(metadata["widths"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file}: its metadata is damaged: {error}") from error
    return record, widths


def read_extra(folder: str | Path) -> dict[str, Any]:
    """The further facts that `save` was given."""
    return json.loads(read_metadata(Path(folder) / PACKED_WEIGHTS).get("extra", "{}"))


def sizes(source: nn.Module | str | Path) -> dict[str, int]:
    """Bytes: `packed_model` (the whole safetensors file), `packed_linears` (codes, scales and biases of the packed layers)
    and `full_precision_bf16` (2 bytes a parameter of the full-precision model, tied ones once).

    `source` is a packed model or a folder of ours.
    """
    if isinstance(source, nn.Module):
        return {
            "packed_model": len(serialize(unique_tensors(source), _metadata(source, None, None))),
            "packed_linears": sum(byte_count(layer.state_dict()) for layer in packed_layers(source).values()),
            "full_precision_bf16": full_precision_bf16(source),
        }
    file = Path(source) / PACKED_WEIGHTS
    record, _ = read_record(file)
    own = {f"{name}.{key}".lstrip(".") for name in record.converted for key in ("packed", "weight_scale", "bias")}
    linears = byte_count({key: tensor for key, tensor in load_file(file).items() if key in own})
    parameters = int(read_metadata(file)["parameters"])
    return {"packed_model": file.stat().st_size, "packed_linears": linears, "full_precision_bf16": 2 * parameters}


def _metadata(model: nn.Module, record: Conversion | None, extra: Mapping[str, Any] | None) -> dict[str, str]:
    layers = packed_layers(model)
    conversion = _packed_record(model, layers, record)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        **WRITER,
        "conversion": conversion.to_json(),
        "widths": json.dumps({name: layer.in_features for name, layer in layers.items()}),
        "parameters": str(parameter_count(model)),
    }
    return metadata if extra is None else {**metadata, "extra": json.dumps(extra)}


def _packed_record(model: nn.Module, layers: Mapping[str, PackedBitLinear], record: Conversion | None) -> Conversion:
    """What the model is, from its layers; only the reasons of the skipped ones come from `record`."""
    if not layers:
        hint = "; call qat.pack first" if any(isinstance(m, BitLinear) for m in model.modules()) else ""
        raise ValueError(f"{type(model).__name__} has no packed layers to save{hint}")
    kinds = {(repr(replace(layer.config, kernels="auto")), layer.layout) for layer in layers.values()}
    if len(kinds) > 1:
        raise ValueError(f"{type(model).__name__} mixes {len(kinds)} kinds of packed layers; one file holds one kind")
    first = next(iter(layers.values()))
    skipped = dict(record.skipped) if record is not None else {}
    return Conversion("packed", replace(first.config, kernels="auto"), list(layers), skipped, first.layout)


def _check_widths(model: nn.Module, widths: Mapping[str, int]) -> None:
    for name, layer in packed_layers(model).items():
        if widths.get(name) != layer.in_features:
            raise ValueError(f"{name} was packed with in_features={widths.get(name)}, but the model has {layer.in_features}")
