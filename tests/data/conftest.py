"""A tokenizer of one token a character, and a text of sixty lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qat.config import DataConfig


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; id = place in the list below, `$` ends a sequence."""
    vocabulary = {character: i for i, character in enumerate("?$<>\n abcdefghijklmnopqrstuvwxyz0123456789")}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="$")


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    text = tmp_path / "train.txt"
    text.write_text("".join(f"line {i} abc\n" for i in range(60)))
    return DataConfig(train=str(text), sequence_length=16, batch_size=2, valid_fraction=0.2, cache_dir=str(tmp_path / "cache"))
