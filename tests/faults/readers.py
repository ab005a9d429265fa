"""Every reader of qat, with the file that it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults.batches import Reader
from faults.mutations import archive_or_bytes, flipped, json_mutation, lines_mutation, safetensors_mutation, yaml_mutation
from faults.samples import TEMPLATE
from torch import nn

from qat.config import ModelConfig
from qat.config.compose.composing import compose_run
from qat.config.compose.saved import load_config
from qat.conversion.record import Conversion
from qat.data import tokens
from qat.data.chat import masked
from qat.data.sources import Source, read_documents
from qat.formats import contents
from qat.formats.bitnet import reading as bitnet
from qat.formats.packed import folder as packed
from qat.formats.pt2 import program
from qat.models.glass import load_glass_model, load_glass_tokenizer
from qat.models.hub import load_model, load_tokenizer
from qat.reporting.result import read_result
from qat.training.callbacks.metrics_file import continued
from qat.training.checkpoints import newest


def equal(one: Any, two: Any) -> bool:
    """Of nested values with tensors and arrays."""
    if isinstance(one, torch.Tensor | np.ndarray):
        return type(one) is type(two) and one.dtype == two.dtype and one.shape == two.shape and bool((one == two).all())
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(two, list | tuple) and len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


def anything(found: Any, expected: Any) -> bool:
    """No sum can tell."""
    return True


def absent_or_equal(found: Any, expected: Any) -> bool:
    """A cache that is damaged is made anew."""
    return found is None or equal(found, expected)


def names_and_finite(found: Any, expected: Any) -> bool:
    """Without sums: every tensor, and numbers."""
    return found.keys() == expected.keys() and all(bool(t.isfinite().all()) for t in found.values() if t.is_floating_point())


def part_of(found: list[Any], expected: list[Any]) -> bool:
    """Layers that are read are right; a config may be made to say that there are fewer."""
    return all(equal(found[name], expected[name]) for name in found if name in expected)  # type: ignore[call-overload]


def rows_fit(found: list[str], expected: Any) -> bool:
    """The row that was appended has the cells of the header, whatever the file held."""
    return found[-1].count(",") == found[0].count(",")


def _state(load: Callable[[Path], nn.Module]) -> Callable[[Path], Any]:
    return lambda folder: {name: value.clone() for name, value in load(folder).state_dict().items()}


def _state_file(folder: Path) -> nn.Module:
    from transformers import AutoConfig

    from qat.formats.packed.folder import empty_model

    model = empty_model(AutoConfig.from_pretrained(folder / "model"))
    packed.load_state(model, folder / "state.safetensors")
    return model


def _layers(path: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        found = contents.read(folder / path)
        return {name: (layer().codes.clone(), layer().scale.clone()) for name, layer in found.layers.items()}

    return read


def _tokenizer(path: str) -> Callable[[Path], Any]:
    return lambda folder: load_tokenizer(ModelConfig(path=str(folder / path)))("the cat sat.")["input_ids"]


def _program(folder: Path) -> Any:
    run = program.load(folder / "x.pt2")
    return run(torch.arange(8).reshape(1, 8))


def _checkpoint(folder: Path) -> Any:
    found = newest(folder / "run/checkpoints")
    return found and torch.load(found.file, weights_only=True)  # as a resume goes on to do


def _metrics(folder: Path) -> Any:
    file = continued(folder / "run/metrics.csv", ["train/loss"], 4)
    file.log_metrics({"train/loss": 1.0}, 5)
    return file.file.read_text().splitlines()


def _documents(name: str) -> Callable[[Path], Any]:
    return lambda folder: list(read_documents(Source(str(folder / name))))


def _chats(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        tokenizer = load_tokenizer(ModelConfig(path=str(folder / "model")))
        tokenizer.chat_template = TEMPLATE
        return len(masked.read_chats(Source(str(folder / name), "messages"), tokenizer)[0])

    return read


def _cache(folder: Path) -> Any:
    return tokens.read(folder / "cache", "tokens")


def _glass_tokenizer(folder: Path) -> Any:
    return load_glass_tokenizer(folder / "glass.npz")("the cat")["input_ids"]


def _record(folder: Path) -> Any:
    record = Conversion.from_json((folder / "record.json").read_text(errors="replace"))
    record.apply(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    return sorted(record.converted)


def _saved(folder: Path) -> Any:
    config = load_config(str(folder / "run"))
    config.check()
    return asdict(config)


def _recipe(folder: Path) -> Any:
    config = compose_run(["recipe=mine"], str(folder / "conf"))
    config.check()
    return asdict(config)


def _model(folder: Path) -> nn.Module:
    return load_model(ModelConfig(path=str(folder / "model")))


READERS: dict[str, Reader] = {
    "packed config": Reader("packed/config.json", json_mutation, _state(lambda f: packed.load(f / "packed")), equal, 300),
    "packed weights": Reader(
        "packed/model.safetensors", safetensors_mutation, _state(lambda f: packed.load(f / "packed")), equal, 300
    ),
    "packed generation": Reader(
        "packed/generation_config.json", json_mutation, _state(lambda f: packed.load(f / "packed")), equal, 150
    ),
    "packed index": Reader(
        "shards/model.safetensors.index.json", json_mutation, _state(lambda f: packed.load(f / "shards")), equal, 200
    ),
    "packed layers": Reader("packed/model.safetensors", safetensors_mutation, _layers("packed"), equal, 500),
    "packed tokenizer": Reader("packed/tokenizer.json", json_mutation, _tokenizer("packed"), anything, 400),
    "state file": Reader("state.safetensors", safetensors_mutation, _state(_state_file), equal, 300),
    "stock config": Reader("hf/config.json", json_mutation, _state(lambda f: bitnet.load(f / "hf")), names_and_finite, 200),
    "stock weights": Reader(
        "hf/model.safetensors", safetensors_mutation, _state(lambda f: bitnet.load(f / "hf")), names_and_finite, 200
    ),
    "gguf": Reader("x.gguf", flipped, _layers("x.gguf"), anything, 1000),
    "gguf tokenizer": Reader("x.gguf", flipped, _tokenizer("x.gguf"), anything, 300),
    "pt2 bytes": Reader("x.pt2", flipped, _program, equal, 300),
    "pt2 entries": Reader("x.pt2", archive_or_bytes, _program, anything, 300),
    "checkpoint bytes": Reader("run/checkpoints/last.ckpt", flipped, _checkpoint, lambda found, whole: found is not None, 500),
    "checkpoint entries": Reader("run/checkpoints/last.ckpt", archive_or_bytes, _checkpoint, anything, 500),
    "saved config": Reader("run/config.yaml", yaml_mutation, _saved, anything, 500),
    "recipe": Reader("conf/recipe/mine.yaml", yaml_mutation, _recipe, anything, 200),
    "metrics": Reader("run/metrics.csv", flipped, _metrics, rows_fit, 1000),
    "result": Reader("run/result.json", json_mutation, lambda f: read_result(f / "run"), anything, 500),
    "result inspected": Reader("run/result.json", json_mutation, _layers("run"), equal, 300),
    "text": Reader("text.txt", flipped, _documents("text.txt"), anything, 500),
    "jsonl": Reader("text.jsonl", lines_mutation, _documents("text.jsonl"), anything, 1000),
    "parquet": Reader("text.parquet", flipped, _documents("text.parquet"), anything, 1000),
    "chats jsonl": Reader("chats.jsonl", lines_mutation, _chats("chats.jsonl"), anything, 500),
    "chats parquet": Reader("chats.parquet", flipped, _chats("chats.parquet"), anything, 300),
    "token cache": Reader("cache/tokens.bin", flipped, _cache, absent_or_equal, 500),
    "token cache facts": Reader("cache/tokens.json", json_mutation, _cache, absent_or_equal, 500),
    "glass weights": Reader("glass.npz", archive_or_bytes, _state(lambda f: load_glass_model(f / "glass.npz")), anything, 400),
    "glass tokenizer": Reader(
        "glass.tokenizer.json",
        json_mutation,
        _glass_tokenizer,
        anything,
        400,
    ),
    "record": Reader("record.json", json_mutation, _record, anything, 500),
    "model config": Reader("model/config.json", json_mutation, _state(_model), names_and_finite, 300),
    "model weights": Reader("model/model.safetensors", safetensors_mutation, _state(_model), names_and_finite, 200),
    "model tokenizer": Reader("model/tokenizer.json", json_mutation, _tokenizer("model"), anything, 400),
    "model tokenizer config": Reader("model/tokenizer_config.json", json_mutation, _tokenizer("model"), anything, 300),
}
