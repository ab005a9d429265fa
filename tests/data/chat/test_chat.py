"""Chats: only what the assistant says is learned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from chats import CHATML, MARKED, say
from transformers import PreTrainedTokenizerFast

from qat.config import DataConfig
from qat.data import build_datamodule
from qat.data.chat import Chats


def chat_data(tmp_path: Path, chats: list, **changes) -> DataConfig:
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    arguments = {"kind": "chat", "train": str(tmp_path / "chat.jsonl"), "sequence_length": 48, "valid_fraction": 0.4} | changes
    return DataConfig(**arguments)


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


def test_bad_rows_are_named_together_and_reading_goes_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML
    chats = [say("a", "b"), say("a"), say("c", "d"), [{"role": "user"}], say("e", "f")]
    with pytest.raises(ValueError, match=r"chat.jsonl:2: nothing .* roles are user \(the first of 2 bad rows: 2, 4\)"):
        build_datamodule(chat_data(tmp_path, chats), tokenizer, total_batches=1)


def test_what_is_not_used_is_said_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML.replace("$", "!")
    row = {"messages": [{"role": "user", "content": "a", "name": "Al"}, {"role": "assistant", "content": "b"}]}
    rows = [row | {"id": i, "source": "x", "tools": [{"type": "function"}]} for i in range(5)]
    data = chat_data(tmp_path, [])
    Path(str(data.train)).write_text("\n".join(map(json.dumps, rows)))
    assert build_datamodule(data, tokenizer, total_batches=1).notes == [
        "chat.jsonl: columns that are not used: id, source",
        "chat.jsonl: tools in 5 chats, not read by the chat template",
        "chat.jsonl: message field 'name' in 5 chats, not read by the chat template",
        "chat.jsonl: no answer ends with a special token in the chat template, so the model does not learn to stop",
    ]


def test_perplexity_of_chats_scores_the_assistant(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML
    chats = [say("a", "b"), say("hi", "yo", "q", "a1"), say("x", "zz")]
    module = build_datamodule(chat_data(tmp_path, chats, valid_fraction=0.7), tokenizer, total_batches=1)
    found = module.eval_windows(48, 48, 8)
    shown = [("".join(tokenizer.convert_ids_to_tokens(ids[0].tolist())), start) for ids, start in found]
    assert shown == [
        ("<user>hi$<assistant>yo$", 20),
        ("<user>hi$<assistant>yo$<user>q$<assistant>a1$", 42),
        ("<user>x$<assistant>zz$", 19),
    ]
    assert [ids.shape[1] - start for ids, start in module.eval_windows(48, 48, 8, 5)] == [3, 2]


@pytest.mark.parametrize("context", [2, 3, 7, 10, 40])
def test_long_turns_are_scored_once_each_with_something_before_it(context: int) -> None:
    mask = np.zeros(40, dtype=bool)
    mask[[0, *range(5, 9), *range(12, 37)]] = True
    chats = Chats([(np.arange(40), mask)], 40, 0)
    scored = [i for ids, start in chats.windows(context) for i in ids[0, start:].tolist()]
    assert scored == [*range(5, 9), *range(12, 37)]
    assert all(1 <= start < ids.shape[1] <= context for ids, start in chats.windows(context))


def test_a_lone_surrogate_in_a_chat_has_its_place(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match="chat.jsonl:2: the chat holds half of a surrogate pair"):
        build_datamodule(chat_data(tmp_path, [say("a", "b"), say("a", "\ud83d")]), tokenizer, total_batches=1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in %}", "refuses this chat .roles: user, assistant.: "),
        ("{{ raise_exception('roles must\nalternate') }}", "chat.jsonl:1: .*roles: user, assistant.: roles must alternate"),
        ("{{ messages[0].absent.deeper }}", "chat.jsonl:1: .*no attribute 'absent'"),
        ("{% generation %}{{ messages[7].content }}{% endgeneration %}", "chat.jsonl:1: the chat template refuses"),
        ("{% generation %}{{ raise_exception('no') }}{% endgeneration %}", "chat.jsonl:1: the chat template refuses.*: no"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "chat.jsonl:1: the chat template refuses.*recursion"),
    ],
)
def test_errors_of_templates_are_one_line(template, message, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as raised:
        build_datamodule(chat_data(tmp_path, [say("a", "b")]), tokenizer, total_batches=1)
    assert "\n" not in str(raised.value)
