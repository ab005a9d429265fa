"""Encoded examples, and batches of them that are padded to their own longest: input_ids, attention_mask [B, L], labels [B]."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qat.data.labelled.names import Labels
from qat.data.labelled.reading import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MULTIPLE = 8
"""Batches are padded to a multiple of so many tokens: kernels work on whole tiles, and there are fewer shapes."""
Item = dict[str, Any]


class Labelled(Dataset):
    """Examples as a model's arguments, unpadded: input_ids, attention_mask and where the tokenizer has them token_type_ids.

    `truncated` counts those that were cut to `length` tokens, of a pair the longer text first.
    """

    def __init__(self, examples: Sequence[Example], labels: Labels, tokenizer: PreTrainedTokenizerFast, length: int) -> None:
        self.length, self.tokenizer, self.names = length, tokenizer, labels
        self.labels = [labels.number(example) for example in examples]
        columns = [list(column) for column in zip(*(example.texts for example in examples), strict=True)]
        whole = tokenizer(*columns, truncation=True, max_length=length, return_overflowing_tokens=False, verbose=False)
        self.inputs = {key: whole[key] for key in tokenizer.model_input_names if key in whole}
        self.truncated = sum(bool(encoding.overflowing) for encoding in whole.encodings)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        """One example's arguments as lists, and its label's number."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {**{key: column[index] for key, column in self.inputs.items()}, "labels": self.labels[index]}

    def size(self, index: int) -> int:
        """Tokens of an example."""
        return len(self.inputs["input_ids"][index])

    def cut(self, most_tokens: int) -> None:
        """Keep the first examples up to so many tokens, at least one."""
        count = self._within(most_tokens)
        self.labels, self.inputs = self.labels[:count], {key: column[:count] for key, column in self.inputs.items()}

    def _within(self, most_tokens: int | None) -> int:
        """How many of the first examples have up to `most_tokens` tokens together; at least one."""
        if most_tokens is None:
            return len(self)
        sums = list(accumulate(map(len, self.inputs["input_ids"])))
        return max(1, bisect_right(sums, most_tokens))

    @staticmethod
    def learned(batch: Mapping[str, Tensor]) -> int:
        """What a step's losses are means over: the examples."""
        return len(batch["labels"])

    def tokens(self) -> np.ndarray:
        """The ids of all examples, one after the other, int64 [T]."""
        return np.concatenate([np.asarray(ids, np.int64) for ids in self.inputs["input_ids"]])

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """A batch, int64: padded on the tokenizer's side to the longest, rounded up to a MULTIPLE within `length`."""
        longest = max(len(item["input_ids"]) for item in items)
        width = max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, self.length))
        inputs = [{key: value for key, value in item.items() if key != "labels"} for item in items]
        batch = self.tokenizer.pad(inputs, padding="max_length", max_length=width, return_tensors="pt", verbose=False)
        return {**batch, "labels": torch.tensor([item["labels"] for item in items])}

    def batches(self, size: int, most_tokens: int | None = None) -> list[dict[str, Tensor]]:
        """The first examples, up to `most_tokens` tokens and at least one example, in batches of like length."""
        count = self._within(most_tokens)
        order = sorted(range(count), key=self.size)
        return [self.collate([self[i] for i in order[start : start + size]]) for start in range(0, count, size)]
