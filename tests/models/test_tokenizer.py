"""A damaged tokenizer is one error when it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qat.config import ModelConfig
from qat.models.glass import load_glass_tokenizer
from qat.models.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer_config.json", {"model_max_length": [512]}),
        ("tokenizer_config.json", {"model_max_length": "many"}),
        ("tokenizer.json", {"model": None}),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Unheard"}}),
        ("tokenizer.json", {"added_tokens": [{"id": -1}]}),
    ],
)
def test_damage_is_found_when_loading(tiny_model: Path, tmp_path: Path, file: str, change: dict[str, Any]) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(ValueError, match="cannot load the tokenizer .*model: ") as raised:
        load_tokenizer(ModelConfig(path=str(folder)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}", '{"alphabet": 3, "merges": []}', '{"alphabet": ["a"], "merges": [["a", "b"]]}', "[]"]
)
def test_a_damaged_tokenizer_beside_an_npz_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"m.tokenizer.json, the tokenizer that belongs to .*m.npz, cannot be read: \S"):
        load_glass_tokenizer(tmp_path / "m.npz")
