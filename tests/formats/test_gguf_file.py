"""The strict reader of GGUF: round trips, damaged and mislabelled files, and loading by stock transformers."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_samples import byte_level, packed_model, random_rows, save

from qat.conversion.layers import packed_layers
from qat.formats.gguf import container as gguf_file
from qat.formats.gguf import stock
from qat.formats.gguf.blocks import BLOCKS, encode


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every kind of value and tensor."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tensors = {}
    for name in BLOCKS:
        t, d = random_rows(name, n=1, blocks=1)
        tensors[name] = gguf_file.Tensor(t.shape, BLOCKS[name].number, encode(t, d, name).reshape(-1))
    tensors["norm"] = gguf_file.Tensor((4,), 0, np.arange(4, dtype=np.float32).view(np.uint8))
    metadata = {"a.list": ["x", "yy"], "a.numbers": [1, 2], "a.float": 0.5, "a.flag": True, "a.int": 7}
    stock.write(file, "llama", metadata, tensors)
    return file.read_bytes()


def load(data: bytes) -> gguf_file.GGUFFile:
    read = gguf_file.parse(np.frombuffer(data, np.uint8))
    for name in read.tensors:
        read.float32(name)
    return read


def test_round_trip_of_a_file(tiny: bytes) -> None:
    read = load(tiny)
    assert read.metadata == {
        "general.architecture": "llama",
        "a.list": ["x", "yy"],
        "a.numbers": [1, 2],
        "a.float": 0.5,
        "a.flag": True,
        "a.int": 7,
    }
    assert list(read.tensors) == [*BLOCKS, "norm"] and read.float32("norm").tolist() == [0, 1, 2, 3]


def test_truncated_files_are_refused(tiny: bytes) -> None:
    whole = len(tiny)
    last = whole - (-16 % 32)  # the padding behind the last tensor may be missing
    for size in range(0, last):
        with pytest.raises(ValueError):
            load(tiny[:size])
    with pytest.raises(ValueError, match="follow the last tensor"):
        load(tiny + bytes(64))


def test_mutated_files_give_a_clear_error_or_a_whole_load(tiny: bytes) -> None:
    random, errors, loads = np.random.default_rng(0), 0, 0
    for _ in range(4000):
        data = bytearray(tiny)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(len(data)))
            choice = random.integers(3)
            if choice == 0:
                data[at] = int(random.integers(256))
            elif choice == 1:
                data[at : at + 8] = random.choice([bytes(8), b"\xff" * 8, struct.pack("<q", 2**62), struct.pack("<q", 31)])
            else:
                del data[at : at + int(random.integers(1, 40))]
        try:
            read = load(bytes(data))
        except ValueError as error:
            assert str(error)
            errors += 1
        else:
            assert all(np.isfinite(read.float32(name)).all() for name in read.tensors)
            loads += 1
    assert errors > 1000 and loads > 100, (errors, loads)


def with_kind(data: bytes, name: str, kind: int) -> bytes:
    at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    dimensions = struct.unpack_from("<I", data, at)[0]
    at += 4 + 8 * dimensions
    return data[:at] + struct.pack("<I", kind) + data[at + 4 :]


@pytest.mark.parametrize(("name", "kind"), [("tq1_0", 35), ("tq2_0", 34), ("q1_0", 42), ("q2_0", 41), ("norm", 1), ("norm", 99)])
def test_mislabelled_tensors_are_refused(tiny: bytes, name: str, kind: int) -> None:
    with pytest.raises(ValueError, match=f"tensor '{name}'|lies at|no multiple"):
        load(with_kind(tiny, name, kind))


def test_q2_0_of_128_is_told_by_its_size(tmp_path: Path) -> None:
    """An old file: same number, a block of 34 bytes for 128 weights; as the last tensor and before another."""
    old = np.zeros(8 * 34 * 2, np.uint8)
    for tensors in (
        {"w": gguf_file.Tensor((8, 256), 42, old)},
        {"w": gguf_file.Tensor((8, 256), 42, old), "z": gguf_file.Tensor((8,), 0, np.zeros(32, np.uint8))},
    ):
        stock.write(tmp_path / "old.gguf", "llama", {}, tensors)
        with pytest.raises(ValueError, match="tensor 'w' is Q2_0 with 128 weights a block"):
            gguf_file.read(tmp_path / "old.gguf")


def test_code_3_names_the_tensor(tmp_path: Path) -> None:
    data = np.concatenate([np.array([1.0], np.float16).view(np.uint8), np.full(16, 0b11, np.uint8)])
    stock.write(tmp_path / "x.gguf", "llama", {}, {"w": gguf_file.Tensor((1, 64), 42, data)})
    with pytest.raises(ValueError, match="tensor 'w' holds code 3"):
        gguf_file.read(tmp_path / "x.gguf").float32("w")


@pytest.mark.parametrize(
    ("kind", "weight"), [("tq1_0", "ternary"), ("tq2_0", "ternary"), ("q2_0", "ternary"), ("q1_0", "binary")]
)
def test_stock_transformers_gets_the_weights_back(
    tmp_path: Path, kind: str, weight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads in transformers' order again, tokenizer included; Q2_0 and Q1_0 by way of a plain copy."""
    from qat.config import ModelConfig
    from qat.models.hub import describe_source, load_model, load_tokenizer

    wide = {"hidden_size": 256, "intermediate_size": 256, "attention_bias": False, "mlp_bias": False}
    model = packed_model(changes={**wide, "vocab_size": 261, "eos_token_id": 260}, weight=weight, scale_dtype="float16")
    tokenizer, config = byte_level(), ModelConfig(path=str(tmp_path / "x.gguf"))
    save(model, tmp_path / "x.gguf", tokenizer=tokenizer, type=kind, card={"license": "mit"})
    monkeypatch.chdir(tmp_path)  # where a file of the same name lies, which transformers would prefer to the copy
    again = load_model(config)
    for name, layer in packed_layers(model).items():
        assert torch.equal(again.get_submodule(name).weight, layer.dequantize()), name
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert load_tokenizer(config)("the 12 cats").input_ids == tokenizer("the 12 cats").input_ids
    bits = 1 if "1" in kind else 2
    assert describe_source(config) == {
        "base_model": "x.gguf",
        "license": "mit",
        "note": f"{bits}-bit GGUF ({kind.upper()}) dequantized",
    }


def test_codes_are_checked_without_a_model(tmp_path: Path) -> None:
    data = np.concatenate([np.array([1.0], np.float16).view(np.uint8), np.full(16, 0b11, np.uint8)])
    stock.write(tmp_path / "x.gguf", "llama", {}, {"w": gguf_file.Tensor((1, 64), 42, data)})
    with pytest.raises(ValueError, match="tensor 'w' holds code 3"):
        gguf_file.read(tmp_path / "x.gguf").check_codes()


def test_i2_s_is_not_loaded(tmp_path: Path) -> None:
    from qat.config import ModelConfig
    from qat.models.hub import describe_source, load_model

    config = ModelConfig(path=str(tmp_path / "x.gguf"))
    save(packed_model("qwen2", {"hidden_size": 128}), tmp_path / "x.gguf", type="i2_s")
    with pytest.raises(ValueError, match="is I2_S of bitnet.cpp, which neither transformers nor llama.cpp reads"):
        load_model(config)
    assert gguf_file.kind_name(36) == "I2_S" and describe_source(config)["note"] == "I2_S GGUF"


def test_loading_a_model_from_a_damaged_gguf_is_one_clear_error(tmp_path: Path, tiny: bytes) -> None:
    from qat.config import ModelConfig
    from qat.models.hub import load_model

    (tmp_path / "x.gguf").write_bytes(tiny[:-40])
    with pytest.raises(ValueError, match="x.gguf is not a whole GGUF file"):
        load_model(ModelConfig(path=str(tmp_path / "x.gguf")))
