"""What a run's data is, in lines for a person: how much of it, how often it is seen, and which tokens are learned."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from qat.data.chat import Chats
from qat.data.chat.masked import IGNORED
from qat.data.datamodule import QATData, Training
from qat.data.mixture import Mixture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST = 160
"""Tokens of the sample."""


def lines(data: QATData, tokenizer: PreTrainedTokenizerFast, devices: int = 1) -> list[str]:
    """The data of a run on `devices`; in the sample, what is learned stands in [[ ]]."""
    sequences = data.total_batches * data.data_config.batch_size * devices
    train, valid = data.train, data.valid
    found = [
        f"training        {data.name}: {len(train):,} sequences, {data.train_tokens:,} tokens",
        f"validation      {data.eval_name}: {len(valid):,} sequences, {len(data.eval_tokens):,} tokens",
        f"epochs          {_epochs(train, sequences)}: {sequences:,} sequences in all",
    ]
    if isinstance(train, Chats):
        count = sum(int(mask[1:].sum()) for _, mask in train.items)
        found.append(f"learned         {count:,} of {data.train_tokens:,} tokens, {100 * count / data.train_tokens:.1f} %")
    return [*found, f"sample          {sample(train[0], tokenizer)}"]


def _epochs(train: Training, sequences: int) -> str:
    """How often a training text is seen; of a mixture each of the two."""
    found = passes(train, sequences)
    return f"{found[0]:,.2f}" if len(found) == 1 else f"{found[0]:,.2f} of the text, {found[1]:,.2f} of what was sampled"


def passes(train: Training, sequences: int) -> list[float]:
    """How often each part of the training data is seen in that many sequences: one number, and of a mixture two."""
    if not isinstance(train, Mixture):
        return [sequences / len(train)]
    return [count / len(part) for count, part in zip(train.counts(sequences), train.parts, strict=True)]


def sample(item: dict[str, torch.Tensor], tokenizer: Any, most: int = MOST) -> str:
    """The first `most` tokens of a sequence on one line, its line ends as \\n; what is learned stands in [[ ]]."""
    kept = int(item["attention_mask"].sum()) if "attention_mask" in item else len(item["input_ids"])
    ids, labels = (item[name][: min(kept, most)].tolist() for name in ("input_ids", "labels"))
    labels[0] = IGNORED  # nothing predicts it
    text = ""
    for learned, group in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORED):
        words = tokenizer.decode([i for i, _ in group], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text += f"[[{words}]]" if learned else words
    return text.replace("\r", "\\r").replace("\n", "\\n") + (" ..." if kept > most else "")
