"""Damaged and hostile files of models and tokenizers: one line of a ValueError, soon."""

from __future__ import annotations

import io
import json
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qat.config import ModelConfig
from qat.models.any import load
from qat.models.glass import SPECIALS
from qat.models.hub import load_model, load_tokenizer, source_dtypes

SETTINGS: dict[str, Any] = {
    "vocab_size": 9,
    "d_model": 8,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "max_len": 8,
    "rope_base": 1e4,
    "eps": 1e-6,
}
SHAPES = {"attn.W_Q": (8, 8), "attn.W_K": (8, 4), "attn.W_V": (8, 4), "attn.W_O": (8, 8), "ffn.W1": (8, 21), "ffn.W3": (8, 21)}
SHAPES |= {"ffn.W2": (21, 8), "norm1.gamma": (8,), "norm2.gamma": (8,)}
DEEP = "[" * 100_000 + "]" * 100_000


def glass(folder: Path, dtype: str = "float32", **changes: Any) -> Path:
    """A whole checkpoint with its tokenizer; `changes` of its settings, or arrays by name."""
    made = np.random.default_rng(0)
    arrays = {f"blocks.0.{name}": made.normal(size=shape) for name, shape in SHAPES.items()}
    arrays |= {"E": made.normal(size=(9, 8)), "norm_f.gamma": np.ones(8)}
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    arrays |= {name: value for name, value in changes.items() if isinstance(value, np.ndarray)}
    settings = SETTINGS | {name: value for name, value in changes.items() if not isinstance(value, np.ndarray)}
    np.savez(folder / "x.npz", __config__=np.array(json.dumps(settings)), **arrays)
    (folder / "x.tokenizer.json").write_text(json.dumps({"alphabet": ["a", "b", "c", "d"], "merges": [["a", "b"]]}))
    return folder / "x.npz"


def refused(path: Path, read: Any = load_model) -> str:
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        read(ModelConfig(path=str(path)))
    assert time.perf_counter() - start < 10 and "\n" not in str(error.value) and path.stem in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_whole_glass_file_loads(tmp_path: Path, dtype: str) -> None:
    path = glass(tmp_path, dtype)
    found, tokenizer = load_model(ModelConfig(path=str(path))), load_tokenizer(ModelConfig(path=str(path)))
    assert set(source_dtypes(found).values()) == {getattr(torch, dtype)} and len(tokenizer) == len(SPECIALS) + 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 10**9}, "n_layers=1000000000, but there are 11 arrays"),
        ({"vocab_size": 10**12}, r"E is \[9, 8\], but the settings ask for"),
        ({"d_model": "8"}, "d_model=8 is no number"),
        ({"n_heads": 0}, "n_heads=0 is no number above 0"),
        ({"n_heads": 3}, "d_model=8 does not fit n_heads=3"),
        ({"eps": None}, "eps=None"),
        ({"n_kv_heads": 2}, "size mismatch"),
        ({"E": np.ones((9, 8), "int8")}, "the array E is int8"),
        ({"E": np.ones((9, 8), "float32") * np.nan}, "NaN"),
        ({"blocks.0.attn.b_Q": np.ones(8, "float32")}, "holds the tensor blocks.0.attn.b_Q for which its Llama has no place"),
        ({"blocks.1.attn.W_Q": np.ones((8, 8), "float32")}, "has no place"),
    ],
)
def test_settings_and_arrays_of_another_model(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    import re

    assert re.search(message, refused(glass(tmp_path, **changes)))


def test_flipped_and_cut_bytes_of_a_glass_file(tmp_path: Path) -> None:
    path = glass(tmp_path)
    whole, made, failed = path.read_bytes(), np.random.default_rng(0), 0
    for trial in range(60):
        data = bytearray(whole[: made.integers(1, len(whole))] if trial % 3 == 0 else whole)
        for at in made.integers(0, len(data), 4):
            data[at] ^= 1 << int(made.integers(8))
        path.write_bytes(data)
        try:
            load_model(ModelConfig(path=str(path)))
        except ValueError as error:
            assert "\n" not in str(error)
            failed += 1
    assert failed > 40


def test_a_glass_config_that_is_deep_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = glass(tmp_path)
    np.savez(path, __config__=np.array(DEEP), E=np.ones(3))
    assert "recursion" in refused(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("E.npy", io.BytesIO(b"\0" * (1 << 20)).getvalue())
    monkeypatch.setattr("qat.models.glass._MOST_BYTES", 1 << 19)
    assert "would be 1048576 bytes" in refused(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "\u0000",
        DEEP,
        '{"alphabet": 5, "merges": []}',
        '{"alphabet": ["a"], "merges": [["a"]]}',
        '{"alphabet": ["a"], "merges": [["q", "z"]]}',
    ],
    ids=range(8),
)
def test_a_glass_tokenizer_that_is_damaged(tmp_path: Path, text: str) -> None:
    path = glass(tmp_path)
    path.with_suffix(".tokenizer.json").write_text(text)
    refused(path, load_tokenizer)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [DEEP, '{"a": ' * 5000 + "1" + "}" * 5000, "{", "\ud800"], ids=["list", "object", "cut", "half"])
def test_deep_and_cut_json(tmp_path: Path, tiny_model: Path, name: str, text: str) -> None:
    shutil.copytree(tiny_model, tmp_path / "x")
    (tmp_path / "x" / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    start = time.perf_counter()
    try:
        load(str(tmp_path / "x"))
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert name == "generation_config.json"
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"hidden_size": -1},
        {"hidden_act": "no_such"},
        {"hidden_act": 5},
        {"rope_parameters": {"rope_type": "no_such"}},
        {"rope_parameters": 5},
        {"rms_norm_eps": "x"},
        {"vocab_size": None},
        {"architectures": 5},
        {"model_type": ["llama"]},
        {"model_type": {}},
        {"quantization_config": 5},
        {"quantization_config": []},
        {"torch_dtype": "float99"},
        {"auto_map": 5},
        {"layer_types": ["x"]},
        {"tie_word_embeddings": "maybe"},
        {"transformers_weights": "../x"},
    ],
    ids=str,
)
def test_config_values_that_are_wrong(tmp_path: Path, tiny_model: Path, change: dict[str, Any]) -> None:
    shutil.copytree(tiny_model, tmp_path / "x")
    file = tmp_path / "x/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    try:
        load(str(tmp_path / "x"))
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
