"""Chats: only what the assistant says is learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from qat.config import DataConfig
from qat.data import build_datamodule

CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '$' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_data(tmp_path: Path, chats: list, **changes) -> DataConfig:
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    arguments = {"kind": "chat", "train": str(tmp_path / "chat.jsonl"), "sequence_length": 48, "valid_fraction": 0.4} | changes
    return DataConfig(**arguments)


def say(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '$' }}{% endgeneration %}{% else %}{{ m.content + '$' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_the_assistant_is_learned(template: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = template
    module = build_datamodule(chat_data(tmp_path, [say("hi", "yo", "q", "a1"), say("x", "z")]), tokenizer, total_batches=1)
    item = module.train[0]
    length = int(item["attention_mask"].sum())
    assert tokenizer.decode(item["input_ids"][:length]).replace(" ", "") == "<user>hi$<assistant>yo$<user>q$<assistant>a1$"
    learned = item["labels"][item["labels"] != -100]
    assert tokenizer.convert_ids_to_tokens(learned.tolist()) == ["y", "o", "$", "a", "1", "$"]
    assert item["input_ids"].shape == item["labels"].shape == (48,) and (item["labels"][length:] == -100).all()
    assert len(module.train) == len(module.valid) == 1 and module.eval_tokens.shape == (len("<user>x$<assistant>z$"),)


def test_long_chats_are_cut_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML
    chats = [say("a", "b" * 60), say("a" * 60, "b"), say("a", "b")]
    module = build_datamodule(chat_data(tmp_path, chats), tokenizer, total_batches=1)
    assert module.notes == [
        "2 training chats cut to 48 tokens",
        "1 training chats dropped: no assistant's word within that length",
    ]


def test_chats_that_cannot_be_masked_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = chat_data(tmp_path, [say("a", "b", "c", "d"), say("a", "b")])
    with pytest.raises(ValueError, match="has none; take an instruction-tuned model"):
        build_datamodule(data, tokenizer, total_batches=1)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content if loop.last else 'x' }}{% endfor %}"
    with pytest.raises(ValueError, match="chat.jsonl:1: the chat template renders message 2 otherwise"):
        build_datamodule(data, tokenizer, total_batches=1)
    with pytest.raises(ValueError, match="chat.jsonl:1: a chat must be a non-empty list"):
        build_datamodule(chat_data(tmp_path, [["hello"]]), tokenizer, total_batches=1)
