"""Chats through the tokenizer's own chat template, with a loss on the assistant's words only.

forms says what a record holds, rendering runs the template, spans finds the assistant's words in its text.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from qat.data.chat.forms import Chat, chat_of
from qat.data.chat.rendering import Renderer, TemplateStopped
from qat.data.chat.spans import encode_spans, rendered_spans
from qat.data.order import predicted_tokens
from qat.data.records import read_records
from qat.data.sources import Source
from qat.metrics.perplexity import Window
from qat.terminal.stage import stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
Encoded = tuple[np.ndarray, np.ndarray]
"""ids int64 [T] and which of them the assistant says, bool [T]"""


class Chats(Dataset):
    """Rendered chats as ids and loss masks, cut and padded to `length`.

    `truncated` counts those that were cut, `dropped` those without an assistant's word within `length`.
    """

    collate = None  # torch's own: they are padded to one length
    learned = staticmethod(predicted_tokens)

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

    def windows(self, context: int, most: int | None = None) -> list[Window]:
        """For perplexity: a window for each of the assistant's turns, the chat before it as its context, the turn scored.

        A turn beyond `context` takes several. Stops once `most` tokens are scored. (As in metrics.perplexity: ids int64 [1, L],
        and the index from which tokens are scored.)
        """
        found: list[Window] = []
        left = sys.maxsize if most is None else most
        for ids, mask in self.items:
            for begin, end in _runs(mask):
                end = min(end, begin + left)
                found += _turn(torch.from_numpy(ids), begin, end, context)
                left -= end - begin
                if left == 0:
                    return found
        return found


def _turn(ids: torch.Tensor, begin: int, end: int, context: int) -> Iterator[Window]:
    """Windows that score [begin, end) of a chat: one where it fits, else as many as leave each half a context before it."""
    step = end - begin if end <= context else context // 2
    for start in range(begin, end, step):
        stop = min(start + step, end)
        low = max(0, stop - context)
        yield ids[None, low:stop], start - low


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of what is said without a break; the first token is never predicted."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask[1:], [0]]).astype(np.int8))) + 1
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


@dataclass
class Seen:
    """What is said once about all chats of a source."""

    unused: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    ended: bool = False
    """Some answer ends with a token of its own, so that the model learns to stop."""

    def notes(self, title: str) -> list[str]:
        """Lines for the user."""
        found = [f"{title}: columns that are not used: {', '.join(sorted(self.unused))}"] if self.unused else []
        found += [f"{title}: {what} in {count} chats, not read by the chat template" for what, count in self.unread.items()]
        stop = f"{title}: no answer ends with a special token in the chat template, so the model does not learn to stop"
        return found if self.ended else [*found, stop]


def read_chats(source: Source, tokenizer: PreTrainedTokenizerFast, most: int | None = None) -> tuple[list[Encoded], list[str]]:
    """Every chat's ids int64 [T] and loss mask bool [T], until `most` tokens in all; and notes for the user.

    Raises ValueError for a tokenizer without a chat template, and for records that are no chats; it names the first of these
    with the reason, and where the others are.
    """
    if not tokenizer.chat_template:
        raise ValueError("data=chat needs a chat template, and this model's tokenizer has none; take an instruction-tuned model")
    chats: list[Encoded] = []
    bad: list[str] = []
    total, seen = 0, Seen()
    with Renderer(tokenizer) as renderer, stage(f"reading {source.title}", unit="chats") as shown:
        for where, record in shown.each(read_records(source)):
            try:
                chats.append(_read(record, where, source.field, renderer, seen))
            except TemplateStopped:
                raise
            except ValueError as error:
                bad.append(str(error))
                if len(bad) == MOST_BAD:
                    break
                continue
            total += len(chats[-1][0])
            if most is not None and total >= most:
                break
    if bad:
        raise ValueError(_bad_rows(bad))
    if not chats:
        raise ValueError(f"data: {source.name!r} has no chats")
    return chats, seen.notes(source.title)


REASONING = ("reasoning_content", "reasoning", "thinking")
MOST_BAD = 10
"""Rows that are named before reading stops."""


def _bad_rows(bad: list[str]) -> str:
    """The first in full; of the others the places."""
    if len(bad) == 1:
        return bad[0]
    count = f"{len(bad)} bad rows" if len(bad) < MOST_BAD else f"at least {MOST_BAD} bad rows"
    return f"{bad[0]} (the first of {count}: {', '.join(_line(error) for error in bad)})"


def _line(error: str) -> str:
    """`FILE:LINE: why` -> LINE."""
    return error.partition(": ")[0].rpartition(":")[2]


def _read(record: dict[str, Any], where: str, column: str, renderer: Renderer, seen: Seen) -> Encoded:
    chat = chat_of(record, where, column)
    encoded = _encode(chat, renderer, where)
    seen.unused.update(chat.unused)
    seen.unread.update(_unread(chat, renderer.tokenizer))
    seen.ended = seen.ended or _ends(encoded, renderer.tokenizer)
    return encoded


def _unread(chat: Chat, tokenizer: Any) -> list[str]:
    """What a chat holds and its template never names."""
    template = tokenizer.get_chat_template(tools=chat.tools)
    fields = {f"message field {name!r}" for m in chat.messages for name in m if not _reads(template, name)}
    options = {f"option {name!r}" for name in chat.options if name not in template}
    return [*(["tools"] if chat.tools and "tools" not in template else []), *sorted(fields), *sorted(options)]


def _reads(template: str, name: str) -> bool:
    """Whether a template names a message's field; reasoning is given to it under each of its names."""
    return any(other in template for other in (REASONING if name in REASONING else (name,)))


def _check_calls(chat: Chat, tokenizer: Any, where: str) -> None:
    """A call that the template leaves out would be learned as an empty answer."""
    if "tool_calls" in tokenizer.get_chat_template(tools=chat.tools):
        return
    for number, (message, learned) in enumerate(zip(chat.messages, chat.learned, strict=True), 1):
        if "tool_calls" in message and learned:
            raise ValueError(
                f"{where}: message {number} of the roles {chat.roles} has tool_calls, which this model's chat template does not"
                " render; take a model with a template for tools, or give the message weight 0"
            )


def _ends(encoded: Encoded, tokenizer: Any) -> bool:
    """Whether what is learned ends with a token that the tokenizer keeps apart, a line end after it or not."""
    ids, mask = encoded
    apart = {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id} - {tokenizer.unk_token_id}
    return not apart.isdisjoint(ids[mask][-3:].tolist())


def encode(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, where: str = "chat") -> Encoded:
    """Ids int64 [T] of a rendered chat and, bool [T], which of them the assistant says."""
    with Renderer(tokenizer) as renderer:
        return _encode(chat_of({"messages": messages}, where), renderer, where)


def _encode(chat: Chat, renderer: Renderer, where: str) -> Encoded:
    _check_calls(chat, renderer.tokenizer, where)
    text, spans = rendered_spans(chat, renderer, where)
    return encode_spans(text, spans, renderer.tokenizer)
