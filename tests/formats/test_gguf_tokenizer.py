"""A tokenizer as GGUF metadata, and those that llama.cpp does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from gguf_samples import byte_level

from qat.formats.gguf import splits
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
    for pattern, name in splits._SPLITS.items():
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


def _with_split(name: str) -> object:
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return byte_level(level if name == "gpt-2" else splits._rule(name))


OTHERWISE = {
    ("gpt-2", "smollm"): "12",
    ("gpt-2", "llama-bpe"): "'S",
    ("smollm", "qwen2"): "'S",
    ("llama-bpe", "qwen2"): "12",
    ("llama-bpe", "phi-2"): "'S",
    ("qwen2", "falcon3"): "12",
}


@pytest.mark.parametrize(("own", "asked"), OTHERWISE)
def test_a_name_of_another_split_is_refused_without_llama_cpp(own: str, asked: str) -> None:
    tokenizer = _with_split(own)
    assert gguf_tokenizer.vocabulary(tokenizer, 261)["tokenizer.ggml.pre"] == own
    with pytest.raises(ValueError, match=f"--pre-tokenizer {asked} splits .* otherwise than the tokenizer"):
        gguf_tokenizer.vocabulary(tokenizer, 261, asked)
    rules = [splits._rule(splits._NAMED[name]) for name in (own, asked)]
    differing = {text for text in splits.battery() if len({str(rule.pre_tokenize_str(text)) for rule in rules}) > 1}
    assert any(OTHERWISE[own, asked] in text for text in differing)


def test_an_alias_is_taken_and_an_unknown_name_for_a_known_split_is_not() -> None:
    assert gguf_tokenizer.vocabulary(_with_split("qwen2"), 261, "stablelm2")["tokenizer.ggml.pre"] == "stablelm2"
    with pytest.raises(ValueError, match="--pre-tokenizer falcon: the tokenizer splits texts as llama-bpe, llama3, .* do"):
        gguf_tokenizer.vocabulary(_with_split("llama-bpe"), 261, "falcon")


PATTERN = next(pattern for pattern, name in splits._SPLITS.items() if name == "qwen2")


@pytest.mark.parametrize(
    ("part", "other"),
    [
        (r"\p{N}|", r"\p{Nd}|"),
        (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"(?:'s|'t|'re|'ve|'m|'ll|'d)"),
        (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"(?i:'s|'t|'re|'ve|'m|'ll)"),
        (r"\p{L}+", r"[\p{L}\p{M}]+"),
        (r"\p{L}+", r"(?:\p{Han}|[^\P{L}\p{Han}]+)"),
        (r"\p{L}+", r"(?:[\p{Hiragana}\p{Katakana}]+|[^\P{L}\p{Hiragana}\p{Katakana}]+)"),
        (r"\p{L}+", r"(?:\p{Thai}+|[^\P{L}\p{Thai}]+)"),
        (r"\p{L}+", r"(?:\p{Lu}+|\p{Ll}+|[^\P{L}\p{Lu}\p{Ll}]+)"),
        (r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?\p{L}+"),
        (r"+[\r\n]*|", r"+|"),
        (r"\s*[\r\n]+|", r"\s*\n|"),
        (r"\s+(?!\S)|", r""),
        (r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]"),
        (r" ?[^\s\p{L}\p{N}]+", r" ?(?:\p{P}+|[^\s\p{L}\p{N}\p{P}]+)"),
        (r" ?[^\s\p{L}\p{N}]+", r" ?(?:\u200d|[^\s\p{L}\p{N}\u200d]+)"),
    ],
)
def test_whatever_a_rule_treats_apart_is_in_the_battery(part: str, other: str) -> None:
    """A split that differs from qwen2's in one clause is not taken for it."""
    from tokenizers import Regex, pre_tokenizers

    assert part in PATTERN
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rule = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN.replace(part, other)), "isolated"), level])
    with pytest.raises(ValueError, match="--pre-tokenizer qwen2 splits .* otherwise"):
        gguf_tokenizer.vocabulary(byte_level(rule), 261, "qwen2")


def test_another_spelling_of_the_same_rule_is_taken() -> None:
    from tokenizers import Regex, pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rule = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(f"(?:{PATTERN})"), "isolated"), level])
    assert gguf_tokenizer.vocabulary(byte_level(rule), 261, "qwen2")["tokenizer.ggml.pre"] == "qwen2"


def test_named_chat_templates_reach_the_file() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": "{{ a }}", "tool use": "{{ b }}", "rag": "{{ c }}"}
    found = {k: v for k, v in gguf_tokenizer.vocabulary(tokenizer, 261).items() if "chat_template" in k}
    assert found == {
        "tokenizer.chat_template": "{{ a }}",
        "tokenizer.chat_template.tool_use": "{{ b }}",
        "tokenizer.chat_template.rag": "{{ c }}",
        "tokenizer.chat_templates": ["rag", "tool_use"],
    }
    tokenizer.chat_template = {"tool-use": "{{ b }}", "tool_use": "{{ c }}"}
    with pytest.raises(ValueError, match="chat template 'tool-use' .* its name is another's in GGUF"):
        gguf_tokenizer.vocabulary(tokenizer, 261)
