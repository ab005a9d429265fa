"""Damaged files: thousands of seeded mutations give a ValueError or exactly what was written, never anything else.

Truncation, flipped and repeated bytes, and JSON with any one value replaced, removed or renamed; in the files and in their
headers. Reading must not crash, hang, or return other weights.
"""

from __future__ import annotations

import errno
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.mutations import flipped, json_mutation, safetensors_mutation
from tiny import packed_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qat
from qat.config import ModelConfig
from qat.conversion.record import Conversion
from qat.formats.bitnet import reading as bitnet
from qat.formats.bitnet import writing as hf
from qat.formats.contents import read
from qat.formats.folder import new_folder
from qat.formats.packed import folder as packed
from qat.formats.seal import SUMS
from qat.models.hub import load_model
from qat.storage import whole

TINY = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def fuzz(
    file: Path,
    mutation: Callable[[bytes, random.Random], bytes],
    load: Callable[[], Any],
    same: Callable[[Any], bool],
    count: int,
) -> None:
    """`count` mutations of `file`; each is refused by ValueError, or what `load` returns is the same."""
    whole, refused = file.read_bytes(), 0
    for seed in range(count):
        data = mutation(whole, random.Random(seed))
        file.write_bytes(data)
        try:
            found = load()
        except ValueError as error:
            assert str(error) and len(str(error)) < 2000, (seed, str(error))
            refused += 1
        except BaseException as error:
            raise AssertionError(f"mutation {seed} of {file.name}: {type(error).__name__}: {error}") from error
        else:
            assert same(found), f"mutation {seed} of {file.name} loaded as something else"
    file.write_bytes(whole)
    assert same(load())
    assert refused > count / 4  # mutations that no reader notices would test nothing


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one)


def llama(layout: str = "2bit", **quant: object) -> LlamaForCausalLM:
    return packed_model(LlamaConfig(**TINY), layout, **quant)


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 7), nn.ReLU(), nn.Linear(7, 3, bias=False))


@pytest.mark.parametrize("layout", ["2bit", "base3"])
def test_file_of_any_module(tmp_path: Path, layout: str) -> None:
    model = module()
    qat.convert(model, qat.QuantConfig(granularity="channel"))
    qat.pack(model, layout=layout)
    packed.save_state(model, tmp_path / "x.safetensors", extra={"a": 1})

    def load() -> nn.Module:
        again = module()
        packed.load_state(again, tmp_path / "x.safetensors")
        return again

    fuzz(tmp_path / "x.safetensors", safetensors_mutation, load, lambda m: equal(m.state_dict(), model.state_dict()), 700)


def contents(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies: what safetensors reads is a view of the file, which is about to change."""
    return {name: (layer().codes.clone(), layer().scale.clone()) for name, layer in read(path).layers.items()}


def test_contents_of_a_packed_folder(tmp_path: Path) -> None:
    packed.save(llama("base3"), tmp_path / "x")
    expected = contents(tmp_path / "x")

    def same(found: dict[str, tuple[Tensor, Tensor]]) -> bool:
        """A config may be made to say that nothing is quantized; what is read as a layer is right."""
        return all(all(map(torch.equal, found[name], expected[name])) for name in found)

    fuzz(tmp_path / "x/model.safetensors", safetensors_mutation, lambda: contents(tmp_path / "x"), same, 300)
    fuzz(tmp_path / "x/config.json", json_mutation, lambda: contents(tmp_path / "x"), same, 300)


def test_result_of_a_run(tmp_path: Path) -> None:
    packed.save(llama(), tmp_path / "run/packed")
    result = {"status": "done", "recipe": "r", "perplexity": {"packed": 4.5, "text": "t"}, "bytes": {"packed_model": 1}}
    (tmp_path / "run/result.json").write_text(json.dumps(result))
    expected = contents(tmp_path / "run")
    fuzz(
        tmp_path / "run/result.json",
        lambda data, rng: flipped(data, rng),
        lambda: read(tmp_path / "run"),
        lambda found: found.layers.keys() == expected.keys() and isinstance(found.facts["run"], str),
        150,
    )


def test_packed_model(tmp_path: Path) -> None:
    """Through transformers: fewer, because each takes 30 ms."""
    model = llama(granularity="group", group_size=4)
    packed.save(model, tmp_path / "x")
    (tmp_path / "x/generation_config.json").unlink()
    (tmp_path / "x" / SUMS).unlink()  # with it, every mutation is refused: tests/formats/test_seal.py

    def load() -> dict[str, Tensor]:
        return packed.load(tmp_path / "x").state_dict()

    expected = model.state_dict()
    fuzz(tmp_path / "x/model.safetensors", safetensors_mutation, load, lambda state: equal(state, expected), 150)
    fuzz(tmp_path / "x/config.json", json_mutation, load, lambda state: equal(state, expected), 150)


def test_bitnet_checkpoint(tmp_path: Path) -> None:
    """Without the seal, nothing has a checksum: what loads has whole codes and positive scales, and every tensor of the model."""
    hf.save(llama(), tmp_path / "x")
    (tmp_path / "x" / SUMS).unlink()
    names = llama().state_dict().keys()

    def fine(model: nn.Module) -> bool:
        layers = dict(model.named_modules())
        return model.state_dict().keys() == names and all(
            bool((layer.weight_scale > 0).all()) and int(layer.codes().abs().max()) <= 1
            for layer in layers.values()
            if isinstance(layer, qat.PackedBitLinear)
        )

    fuzz(tmp_path / "x/model.safetensors", safetensors_mutation, lambda: bitnet.load(tmp_path / "x"), fine, 100)
    (tmp_path / "x/generation_config.json").unlink()
    fuzz(tmp_path / "x/config.json", json_mutation, lambda: bitnet.load(tmp_path / "x"), fine, 100)


def test_full_precision_checkpoint(tmp_path: Path) -> None:
    """As a model to train is read: no checksums either."""
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    model.save_pretrained(tmp_path / "x")
    names = model.state_dict().keys()

    def fine(found: nn.Module) -> bool:
        state = found.state_dict()
        return state.keys() == names and all(bool(tensor.isfinite().all()) for tensor in state.values())

    load = functools.partial(load_model, ModelConfig(path=str(tmp_path / "x")))
    fuzz(tmp_path / "x/model.safetensors", safetensors_mutation, load, fine, 100)


def test_conversion_record(tmp_path: Path) -> None:
    record = qat.convert(module())
    (tmp_path / "record").write_text(record.to_json())

    def load() -> Conversion:
        read = Conversion.from_json((tmp_path / "record").read_text(errors="replace"))
        read.apply(module())
        return read

    fuzz(tmp_path / "record", json_mutation, load, lambda read: set(read.converted) <= set(record.converted), 400)


def test_shards_cannot_lie_elsewhere(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "x", max_shard_size=300)
    index = tmp_path / "x/model.safetensors.index.json"
    whole = json.loads(index.read_text())
    (tmp_path / "outside.safetensors").write_bytes(next((tmp_path / "x").glob("*.safetensors")).read_bytes())
    index.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not an index"):
        packed.load(tmp_path / "x")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "weights.bin", 3, ".."):
        first = next(iter(whole["weight_map"]))
        index.write_text(json.dumps({**whole, "weight_map": {**whole["weight_map"], first: name}}))
        for load in (packed.load, read):
            with pytest.raises(ValueError, match="no safetensors file of this folder|is not an index"):
                load(tmp_path / "x")


@pytest.mark.parametrize("failing", range(4))
def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """ENOSPC at the first, second, ... file that the export writes; what was there before stays."""
    model = llama()
    before = {path: path.read_bytes() for path in packed.save(model, tmp_path / "x").iterdir()}
    written = []

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def counting(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if len(written) == failing % 2:
                full()
            written.append(args)
            return write(*args, **kwargs)

        return wrapped

    module = packed if failing < 2 else hf
    monkeypatch.setattr(module, "save_file", counting(module.save_file))
    monkeypatch.setattr(LlamaConfig, "save_pretrained", counting(LlamaConfig.save_pretrained))
    for target in (tmp_path / "x", tmp_path / "new"):
        written.clear()
        with pytest.raises(ValueError, match=f"cannot write {target}.*No space left"):
            module.save(model, target)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "x"]
    assert {path: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before


def test_an_interrupted_rename_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packed.save(llama(), tmp_path / "x")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if Path(target) == folder and ".partial" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(whole, "exchange", lambda one, two: False)  # as where a file system cannot
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(ValueError, match="No space left"), new_folder(folder) as partial:
        for name, data in before.items():
            (partial / name).write_bytes(data + b" ")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
