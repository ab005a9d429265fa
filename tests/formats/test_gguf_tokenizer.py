"""A tokenizer as GGUF metadata, and those that llama.cpp does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from gguf_samples import byte_level

from qat.formats.gguf import tokenizer as gguf_tokenizer


def test_byte_level_vocabulary() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages }}"
    found = gguf_tokenizer.vocabulary(tokenizer, 264)
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.merges"] == ["t h", "th e", "Ġ the", "1 2"]
    assert found["tokenizer.ggml.tokens"][256:] == ["th", "the", "Ġthe", "12", "<|end|>", "[PAD261]", "[PAD262]", "[PAD263]"]
    assert found["tokenizer.ggml.token_type"][255:] == [1, 1, 1, 1, 1, 3, 5, 5, 5]
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.bos_token_id"] == 260
    assert found["tokenizer.ggml.add_bos_token"] is False and found["tokenizer.chat_template"] == "{{ messages }}"
    with pytest.raises(ValueError, match="has the id 260, but the embedding only 200 rows"):
        gguf_tokenizer.vocabulary(tokenizer, 200)


def test_text_splits_are_recognized_or_refused() -> None:
    from tokenizers import Regex, pre_tokenizers

    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert gguf_tokenizer.vocabulary(byte_level(digits), 261)["tokenizer.ggml.pre"] == "smollm"
    for pattern, name in gguf_tokenizer._SPLITS.items():
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), levels])
        assert gguf_tokenizer.vocabulary(byte_level(split), 261)["tokenizer.ggml.pre"] == name
    odd = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("a+"), "isolated"), levels])
    with pytest.raises(ValueError, match="is not recognized; name llama.cpp's own by --pre-tokenizer"):
        gguf_tokenizer.vocabulary(byte_level(odd), 261)
    assert gguf_tokenizer.vocabulary(byte_level(odd), 261, "falcon")["tokenizer.ggml.pre"] == "falcon"


def test_other_tokenizers_are_refused(tiny_model: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match="a WordLevel tokenizer is not done for gguf"):
        gguf_tokenizer.vocabulary(words, 64)
    with pytest.raises(ValueError, match="no eos, pad or unk token"):
        gguf_tokenizer.vocabulary(byte_level(None, additional_special_tokens=["<x>"]), 261)
