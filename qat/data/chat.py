"""Chats in the `messages` form, through the tokenizer's own chat template, with a loss on the assistant's words only.

A template that marks them ({% generation %}) is taken at its word. For the others, each assistant turn is what rendering the
chat up to and including it adds to rendering the chat before it with the generation prompt. Text is compared, not tokens: a
token may straddle the border, and then belongs to the side on which it starts. A template that rewrites earlier turns (some
drop old reasoning) has no such prefix and is refused rather than trained on a wrong mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from qat.data.sources import Source, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
Encoded = tuple[np.ndarray, np.ndarray]
"""ids int64 [T] and which of them the assistant says, bool [T]"""


class Chats(Dataset):
    """Rendered chats as ids and loss masks, cut and padded to `length`.

    `truncated` counts those that were cut, `dropped` those without an assistant's word within `length`.
    """

    def __init__(self, encoded: list[Encoded], length: int, pad: int) -> None:
        self.length = length
        self._fills = {"input_ids": pad, "labels": IGNORED, "attention_mask": 0}
        kept = [(ids[:length], mask[:length]) for ids, mask in encoded]
        self.items = [(ids, mask) for ids, mask in kept if mask[1:].any()]  # the first token is never predicted
        self.truncated = sum(len(ids) > length for ids, _ in encoded)
        self.dropped = len(kept) - len(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` (-100: ignored) and `attention_mask`, int64 [length], padded on the right."""
        ids, mask = self.items[index]
        item = {name: np.full(self.length, fill) for name, fill in self._fills.items()}
        item["input_ids"][: len(ids)] = ids
        item["labels"][: len(ids)] = np.where(mask, ids, IGNORED)
        item["attention_mask"][: len(ids)] = 1
        return {name: torch.from_numpy(value) for name, value in item.items()}

    def tokens(self) -> np.ndarray:
        """The ids of all chats, one after the other, int64 [T]."""
        return np.concatenate([ids for ids, _ in self.items]) if self.items else np.empty(0, np.int64)


def read_chats(source: Source, tokenizer: PreTrainedTokenizerFast, most: int | None = None) -> list[Encoded]:
    """Every chat's ids int64 [T] and loss mask bool [T]; stops after `most` tokens in all.

    Raises ValueError for a tokenizer without a chat template, and for records that are no list of {role, content}.
    """
    if not tokenizer.chat_template:
        raise ValueError("data=chat needs a chat template, and this model's tokenizer has none; take an instruction-tuned model")
    chats: list[Encoded] = []
    total = 0
    for where, messages in read_records(source):
        chats.append(encode(_checked(messages, where), tokenizer, where))
        total += len(chats[-1][0])
        if most is not None and total >= most:
            break
    if not chats:
        raise ValueError(f"data: {source.name!r} has no chats")
    return chats


def _checked(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
        raise ValueError(f"{where}: a chat must be a non-empty list of objects with role and content")
    return messages


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= message.keys()


def encode(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, where: str = "chat") -> Encoded:
    """Ids int64 [T] of a rendered chat and, bool [T], which of them the assistant says."""
    if "{% generation" in str(tokenizer.chat_template).replace("{%-", "{%"):
        out: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return np.asarray(out["input_ids"]), np.asarray(out["assistant_masks"], dtype=bool)
    text = _render(tokenizer, messages, where)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.asarray([start for start, _ in out["offset_mapping"]])
    mask = np.zeros(len(starts), dtype=bool)
    for begin, end in _assistant_spans(tokenizer, messages, text, where):
        mask |= (starts >= begin) & (starts < end)
    return np.asarray(out["input_ids"]), mask


def _render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], where: str, *, prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # templates raise jinja's errors, of several classes, with text for people
        raise ValueError(f"{where}: the chat template refuses this chat: {error}") from error


def _assistant_spans(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], text: str, where: str
) -> Iterator[tuple[int, int]]:
    """The characters of `text` that each assistant turn adds, its end marker included."""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:turn], where, prompt=True) if turn else ""
        after = _render(tokenizer, messages[: turn + 1], where)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"{where}: the chat template renders message {turn + 1} otherwise once others follow, so the prompt cannot be "
                "masked; use a template with {% generation %} markers, or chats with one assistant turn"
            )
        yield len(before), len(after)
