"""What a run's labelled examples are, in lines for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qat.data.datamodule import QATData
from qat.data.labelled.parts import Labelled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST = 64
"""Tokens of the sample."""


def lines(data: QATData, tokenizer: PreTrainedTokenizerFast, devices: int = 1) -> list[str]:
    """The examples of a run on `devices`, and the first of them with its label."""
    train, valid = data.train, data.valid
    assert isinstance(train, Labelled) and isinstance(valid, Labelled)
    examples = data.total_batches * data.data_config.batch_size * devices
    return [
        f"training        {data.name}: {len(train):,} examples, {data.train_tokens:,} tokens",
        f"validation      {data.eval_name}: {len(valid):,} examples, {len(data.eval_tokens):,} tokens",
        f"epochs          {examples / len(train):,.2f}: {examples:,} examples in all",
        f"sample          {_sample(train, tokenizer)}",
    ]


def _sample(part: Labelled, tokenizer: Any) -> str:
    ids, label = part.inputs["input_ids"][0][:MOST], part.names.names[part.labels[0]]
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return f"{text} -> {label}".replace("\r", "\\r").replace("\n", "\\n")
