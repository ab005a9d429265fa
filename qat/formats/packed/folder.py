"""Our own folder: a transformers folder with `quant_method: "qat"`, written for every run, because it holds what no stock format
can (groups, channels, binary, base-3, any width).

config.json carries the manifest (`manifest`), model.safetensors the tensors; after `import qat`, transformers loads
it (`quantizer`). Without qat, transformers stops at the shape of the packed weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn

from qat.conversion.layers import full_precision_bf16, packed_layers
from qat.conversion.record import Conversion
from qat.formats import upstream
from qat.formats.code import check_trust, save_code
from qat.formats.dtypes import as_stored, remember
from qat.formats.folder import WEIGHTS, new_file, new_folder, one_line, read_metadata, refuse_depth, refuse_report
from qat.formats.packed.manifest import METHOD, describe, parse
from qat.formats.stored import (
    CHECKSUMS,
    check_checksums,
    file_metadata,
    file_names,
    module_names,
    own_tensors,
    read_shapes,
    save_file,
    stored_bytes,
    weight_files,
)
from qat.formats.tensors import byte_count, check_finite, check_tensors, unique_tensors


def save(
    model: nn.Module,
    folder: str | Path,
    record: Conversion | None = None,
    tokenizer: Any = None,
    extra: Mapping[str, Any] | None = None,
    *,
    floats: str = "source",
) -> Path:
    """Write a packed transformers model: model.safetensors, config.json, generation config and tokenizer.

    `model.save_pretrained` writes the same, in shards too; this adds the reasons of skipped layers and `extra`, leaves
    nothing behind where it fails, and takes generation configs that transformers refuses to save.

    Args:
        model: with PackedBitLinear layers (`qat.pack`).
        folder: replaced if an earlier export wrote it.
        record: of `convert` or `pack`; the reasons of skipped layers are taken from it.
        tokenizer: any object with `save_pretrained`.
        extra: further JSON-able facts, kept in the file's metadata. Its "card" is the model card's of a later export.
        floats: in which dtype what is not quantized is stored, of `qat.targets.FLOATS`; loaded, it is float32 again.

    Raises:
        ValueError: nothing is packed, no transformers config, a foreign target, or the disk refuses.
    """
    config = copy.deepcopy(transformers_config(model))
    config.quantization_config = describe(model, record)
    config.dtype = getattr(model, "dtype", torch.float32)
    with new_folder(folder) as partial:
        _write(model, partial / WEIGHTS, {} if extra is None else {"extra": json.dumps(extra)}, floats)
        save_config(model, config, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return Path(folder)


def load(folder: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The packed model of a folder, read by transformers: float32, eval mode, on the CPU. Stricter than `from_pretrained`.

    Args:
        trust_remote_code: whether Python code in the folder may run.

    Raises:
        ValueError: not such a folder, unknown version, truncated or wrong contents; the file is named. Or code without trust.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_trust(folder, config, trust_remote_code)
    parse(config["quantization_config"])
    refuse_depth(config, sum(len(read_shapes(file)) for file in weight_files(folder)))
    try:
        upstream.listen()
        where = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        reader = _reader(config, trust_remote_code)
        model, report = reader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **where)
    except Exception as error:  # transformers raises nearly any class here
        raise ValueError(f"cannot load {folder}: {one_line(error)}") from error
    refuse_report(report, folder)
    check_finite(model, str(folder))
    remember(model, _stored_dtypes(weight_files(folder)))
    return model.eval()


def _reader(config: Mapping[str, Any], trust: bool) -> Any:
    """The class that reads a folder: the one that its config names, or by `auto_map`."""
    import transformers

    named = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
    by_code = trust and "AutoModelForCausalLM" in (config.get("auto_map") or {})
    return named if hasattr(named, "from_pretrained") and not by_code else transformers.AutoModelForCausalLM


def is_packed(folder: str | Path) -> bool:
    """Whether `folder` says of itself that it is a packed model of ours."""
    try:
        return read_config(Path(folder))["quantization_config"]["quant_method"] == METHOD
    except (ValueError, KeyError, TypeError):
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a packed folder; ValueError where it is none."""
    file = folder / "config.json"
    if (folder / "packed.safetensors").exists():
        raise ValueError(f"{folder} is a packed folder of version 1, which this qat does not read; write it again from its run")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["quantization_config"]["quant_method"] != METHOD:
            raise ValueError(f"quant_method is {config['quantization_config']['quant_method']!r}, not {METHOD!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not the config of a packed model of qat: {one_line(error)}") from error
    return config


def transformers_config(model: nn.Module) -> Any:
    """The model's transformers config, or ValueError."""
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type") or not hasattr(config, "save_pretrained"):
        raise ValueError(f"{type(model).__name__} has no transformers config; save_state writes any module's tensors")
    return config


def save_config(model: nn.Module, config: Any, folder: Path) -> None:
    """config.json (naming the model's class), the code that it needs, and generation_config.json."""
    config.architectures = [type(model).__name__]
    save_code(model, config, folder)
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

    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    try:
        named = getattr(transformers, str((config.architectures or [""])[0]), None)
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
    """Write the tensors of any module with PackedBitLinear layers, tied ones once, into a file that says all about itself.

    Arguments as in `save`. The file appears whole or not at all.
    """
    metadata = {"manifest": json.dumps(describe(model, record))}
    with new_file(file) as partial:
        _write(model, partial, metadata if extra is None else {**metadata, "extra": json.dumps(extra)})


def load_state(model: nn.Module, file: str | Path) -> Conversion:
    """Put the file's packed layers into a fresh, unconverted `model`, load every tensor, and return the record.

    Raises:
        ValueError: naming the file: not written by `save_state`, unknown version, truncated, a missing, unexpected, damaged
            or misshapen tensor, a byte that holds no codes, or a manifest that does not fit the model.
    """
    file = Path(file)
    metadata = read_metadata(file)
    for key in ("manifest", CHECKSUMS):
        if key not in metadata:
            raise ValueError(f"{file} was not written by qat.formats.packed.folder.save_state: its metadata has no {key}")
    try:
        record, widths = parse(json.loads(metadata["manifest"]))
        check_checksums(file, read_shapes(file))
        record.apply(model)
        for name, layer in packed_layers(model).items():
            if widths[name] != layer.in_features:
                raise ValueError(f"{name} was packed with in_features={widths[name]}, but the model has {layer.in_features}")
        tensors = module_names(model, load_file(file))
        check_tensors(model, tensors)
        model.load_state_dict(tensors, strict=False)
    except (ValueError, RuntimeError, SafetensorError, OSError, RecursionError) as error:
        raise ValueError(f"{file}: {one_line(error)}") from error
    return record


def read_extra(folder: str | Path) -> dict[str, Any]:
    """The further facts that `save` was given."""
    text = read_metadata(weight_files(Path(folder))[0]).get("extra", "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: the metadata's extra facts are damaged: {error}") from error


def sizes(source: nn.Module | str | Path) -> dict[str, int]:
    """Bytes: `packed_model` (the safetensors files), `packed_linears` (codes, scales, biases and norms of the packed layers)
    and `full_precision_bf16` (2 bytes a parameter of the full-precision model, tied ones once).

    `source` is a packed model or a folder of ours.
    """
    if isinstance(source, nn.Module):
        tensors = _stored_tensors(source)
        return {
            "packed_model": len(serialize(tensors, file_metadata(source, tensors))),
            "packed_linears": sum(byte_count(layer.state_dict()) for layer in packed_layers(source).values()),
            "full_precision_bf16": full_precision_bf16(source),
        }
    files = weight_files(Path(source))
    record, _ = parse(read_config(Path(source))["quantization_config"])
    own = own_tensors(record.converted)
    shapes = {name: shape for file in files for name, shape in read_shapes(file).items() if name in own}
    return {
        "packed_model": sum(file.stat().st_size for file in files),
        "packed_linears": stored_bytes(shapes.values()),
        "full_precision_bf16": 2 * int(read_metadata(files[0])["parameters"]),
    }


def _write(model: nn.Module, file: Path, metadata: Mapping[str, str], floats: str = "source") -> None:
    tensors = _stored_tensors(model, floats)
    save_file(tensors, file, {**file_metadata(model, tensors), **metadata})


def _stored_tensors(model: nn.Module, floats: str = "source") -> dict[str, torch.Tensor]:
    return file_names(model, as_stored(model, unique_tensors(model), floats))


def _stored_dtypes(files: list[Path]) -> dict[str, torch.dtype]:
    """Of floating-point tensors, whose names in files are the model's."""
    shapes = {name: about for file in files for name, about in read_shapes(file).items()}
    return {name: dtype for name, (dtype, _) in shapes.items() if isinstance(dtype, torch.dtype) and dtype.is_floating_point}
