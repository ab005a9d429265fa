"""The token cache: separated documents, keys, damage, full disks."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qat.config import DataConfig
from qat.data import text_tokens, tokens
from qat.data.sources import Source


def test_documents_are_separated_and_cached(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "ab"}\n{"text": ""}\n{"text": "c"}\n')
    array = tokens.tokenize(Source(str(file)), tokenizer, tmp_path / "cache")
    assert array.dtype == np.uint16 and tokenizer.convert_ids_to_tokens(array.tolist()) == ["a", "b", "$", "c"]
    assert tokens.tokenize(Source(str(file)), tokenizer, tmp_path / "cache", max_tokens=4).tolist() == array[:4].tolist()
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 2  # the limit belongs to the key
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_cached_text_is_not_tokenized_again(data: DataConfig, tokenizer: PreTrainedTokenizerFast, monkeypatch) -> None:
    first = text_tokens(str(data.train), tokenizer, data, None)
    monkeypatch.setattr(tokens, "_encode", None)
    assert torch.equal(text_tokens(str(data.train), tokenizer, data, None), first)
    Path(str(data.train)).write_text("other text")
    with pytest.raises(TypeError):  # another content: tokenized again, which the patch forbids
        text_tokens(str(data.train), tokenizer, data, None)


@pytest.mark.parametrize("damage", ["truncate", "flip", "sidecar", "nested", "kind", "negative"])
def test_a_damaged_cache_is_made_anew(data: DataConfig, tokenizer: PreTrainedTokenizerFast, damage: str) -> None:
    first = text_tokens(str(data.train), tokenizer, data, None)
    [file] = Path(str(data.cache_dir)).glob("*.bin")
    raw = file.read_bytes()
    wrong = {
        "sidecar": "{",
        "nested": "[" * 100_000,
        "kind": json.dumps({"tokens": len(raw), "dtype": "|S1", "crc32": zlib.crc32(raw)}),
        "negative": json.dumps({"tokens": -1, "dtype": "<u2", "crc32": zlib.crc32(raw)}),
    }
    if damage in wrong:
        file.with_suffix(".json").write_text(wrong[damage])
    else:
        file.write_bytes(raw[:-2] if damage == "truncate" else bytes([raw[0] ^ 1]) + raw[1:])
    assert torch.equal(text_tokens(str(data.train), tokenizer, data, None), first)
    assert file.read_bytes() == raw


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def blocks():
        yield [1, 2, 3]
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="No space left on device; free space there or set data.cache_dir"):
        tokens.write(tmp_path, "name", blocks(), vocabulary=10)
    assert not list(tmp_path.iterdir())


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert tokens.write(tmp_path, "name", [[65_536, 7]], vocabulary=65_537).tolist() == [65_536, 7]


def test_a_document_that_ends_with_an_empty_piece_ends() -> None:
    pieces = iter([([1, 2], False), ([], True), ([], True), ([3], True)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "encode_pieces", lambda *_: pieces)
        patch.setattr(tokens, "_prefix", lambda _: [])
        found = list(tokens._encode(Source("pydoc_data.topics"), SimpleNamespace(eos_token_id=9)))  # type: ignore[arg-type]
    assert found == [[1, 2], [9, 3]]
