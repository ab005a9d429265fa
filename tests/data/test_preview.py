"""What a dry run says of the data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from chats import CHATML, say
from transformers import PreTrainedTokenizerFast

from qat.config import DataConfig
from qat.data import build_datamodule
from qat.data.preview import lines


def spelled(text: str) -> str:
    """The fixture's tokenizer decodes with a blank between tokens."""
    return text.replace(" ", "")


def test_chats_show_what_is_learned(data: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.chat_template = CHATML
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": say("a\nb", "yo", "q", "z")}) for _ in range(5)))
    chats = replace(data, kind="chat", train=str(file), sequence_length=64)
    training, validation, epochs, learned, sample = lines(build_datamodule(chats, tokenizer, total_batches=6), tokenizer, 2)
    assert training == "training        chat.jsonl: 4 sequences, 180 tokens"
    assert validation.startswith("validation      last 20 % of chat.jsonl: 1 sequences, 45 tokens")
    assert epochs == "epochs          6.00: 24 sequences in all"
    assert learned == "learned         20 of 180 tokens, 11.1 %"
    assert spelled(sample) == "sample<user>a\\nb$<assistant>[[yo$]]<user>q$<assistant>[[z$]]"


def test_of_text_all_but_the_first_token_is_learned(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    *_, epochs, sample = lines(build_datamodule(data, tokenizer, total_batches=5), tokenizer)
    count = len(build_datamodule(data, tokenizer, total_batches=5).train)
    assert epochs == f"epochs          {10 / count:.2f}: 10 sequences in all"
    assert spelled(sample) == "samplel[[ine0abc\\nline]]"
