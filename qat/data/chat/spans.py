"""Which characters of a rendered chat the assistant says, and which tokens these are.

A template that marks them ({% generation %}) is rendered a second time with a character before and one after each marked block,
characters that occur nowhere in the chat; taken out again they must leave the same text. transformers' own marks are not used:
its offsets are wrong where a block stands in a macro, and its token mask where a character has no token (a block's last one is
then the whole rest of the chat), where a block begins with the text (its end is token 0, taken for none), or is empty.

For templates without marks, each assistant turn is what rendering the chat up to and including it adds to rendering the chat
before it with the generation prompt. Text is compared, not tokens: a token may straddle the border, and then belongs to the side
on which it starts. A template that rewrites earlier turns (some drop old reasoning) has no such prefix and is refused rather than
trained on a wrong mask. A chat that begins with the assistant has nothing before it to be rendered, while the text may begin with
the template's own system prompt: there the turn begins where its words do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from qat.data.chat.forms import Chat
from qat.data.chat.rendering import Rendered, Renderer, Request, TemplateStopped
from qat.data.records import checked_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Spans = list[tuple[int, int]]
_MARK = re.compile(r"\{%([-+]?)\s*(generation|endgeneration)\s*([-+]?)%\}")
_PRIVATE = range(0xE800, 0xF8FF)


def rendered_spans(chat: Chat, renderer: Renderer, where: str) -> tuple[str, Spans]:
    """The chat's text and the characters [begin, end) of it that are learned. Raises ValueError with the place."""
    try:
        template = renderer.tokenizer.get_chat_template(tools=chat.tools)  # type: ignore[arg-type]
        marked = _MARK.search(template) is not None
        return _marked(chat, template, renderer, where) if marked else _unmarked(chat, renderer, where)
    except RecursionError as error:
        raise ValueError(f"{where}: this chat is nested too deeply") from error


def _render(chat: Chat, requests: list[Request], renderer: Renderer, where: str) -> list[Rendered]:
    try:
        return renderer(requests)
    except TemplateStopped as error:
        raise TemplateStopped(f"{where}: {error}") from error


def _text(rendered: Rendered, chat: Chat, where: str) -> str:
    if rendered.error is not None:
        raise ValueError(f"{where}: the chat template refuses this chat (roles: {chat.roles}): {rendered.error}")
    return checked_text(rendered.text, f"{where}: the chat")


def _marked(chat: Chat, template: str, renderer: Renderer, where: str) -> tuple[str, Spans]:
    given = json.dumps([chat.messages, chat.tools, chat.options], ensure_ascii=False, default=str)
    begin, end = _unused_characters(template + given)
    wrapped = _MARK.sub(lambda m: _with_character(m, begin if m[2] == "generation" else end), template)
    requests = [Request(chat.messages, chat.tools, chat.options, template=t) for t in (None, wrapped)]
    text, shown = (_text(rendered, chat, where) for rendered in _render(chat, requests, renderer, where))
    spans = _between(shown, begin, end)
    if shown.replace(begin, "").replace(end, "") != text or spans is None:
        raise ValueError(
            f"{where}: what the chat template marks with {{% generation %}} cannot be found in its text, which it changes later"
        )
    return text, _learned_of(spans, chat, where)


def _unused_characters(text: str) -> list[str]:
    return [c for c in map(chr, _PRIVATE) if c not in text][:2]


def _with_character(mark: re.Match[str], character: str) -> str:
    """Blocks on both sides, so that the line ends and blanks around a mark are trimmed as before."""
    return f"{{%{mark[1]} if true %}}{{{{'{character}'}}}}{{% endif {mark[3]}%}}"


def _between(shown: str, begin: str, end: str) -> Spans | None:
    """Begin and end of the marked characters, counted without the marks; None where the marks are not in pairs."""
    marks = [(match.start() - i, match[0]) for i, match in enumerate(re.finditer(f"[{begin}{end}]", shown))]
    if [mark for _, mark in marks] != [begin, end] * (len(marks) // 2):
        return None
    places = [place for place, _ in marks]
    return list(zip(places[::2], places[1::2], strict=True))


def _learned_of(spans: Spans, chat: Chat, where: str) -> Spans:
    """The spans of those assistant turns that are learned."""
    turns = [learned for message, learned in zip(chat.messages, chat.learned, strict=True) if message["role"] == "assistant"]
    if all(turns) or not any(turns):
        return spans if all(turns) else []
    if len(turns) != len(spans):
        raise ValueError(
            f"{where}: some of the assistant's {len(turns)} messages are not to be learned, but the chat template marks"
            f" {len(spans)} parts, so it cannot be told which is whose"
        )
    return [span for span, learned in zip(spans, turns, strict=True) if learned]


def _unmarked(chat: Chat, renderer: Renderer, where: str) -> tuple[str, Spans]:
    turns = [turn for turn, learned in enumerate(chat.learned) if learned]
    requests = [Request(chat.messages, chat.tools, chat.options)]
    for turn in turns:
        requests += [_request(chat, turn, prompt=True)] if turn else []
        requests.append(_request(chat, turn + 1))
    found = iter(_render(chat, requests, renderer, where))
    text = _text(next(found), chat, where)
    spans = []
    for turn in turns:
        before = _text(next(found), chat, where) if turn else text[: _first_word(chat, text, renderer, where)]
        after = _text(next(found), chat, where)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"{where}: the chat template renders message {turn + 1} otherwise once others follow, so the prompt cannot be "
                "masked; use a template with {% generation %} markers, or chats with one assistant turn"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _request(chat: Chat, count: int, *, prompt: bool = False) -> Request:
    return Request(chat.messages[:count], chat.tools, chat.options, prompt)


def _first_word(chat: Chat, text: str, renderer: Renderer, where: str) -> int:
    """Where the words of a chat's first message begin in its text: a character before them, which is then looked for."""
    [character, _] = _unused_characters(text + json.dumps(chat.messages, ensure_ascii=False, default=str))
    first, *rest = chat.messages
    variants = [{**first, name: character + words} for name, words in _words(first)]
    requests = [Request([variant, *rest], chat.tools, chat.options) for variant in variants]
    shown = [rendered.text for rendered in _render(chat, requests, renderer, where)]
    places = [s.index(character) for s in shown if s.count(character) == 1 and s.replace(character, "") == text]
    if not places:
        raise ValueError(f"{where}: where the words of the assistant's message 1 begin in the chat's text cannot be found")
    return min(places)


def _words(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The text fields of a message, as they are and without the blanks that some templates cut off."""
    for name, value in message.items():
        if isinstance(value, str) and name != "role":
            yield from ((name, value), (name, value.lstrip()))


def encode_spans(text: str, spans: Spans, tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 [T] of a text, and bool [T]: the tokens that start within a span."""
    out: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, padding=False, truncation=False, verbose=False
    )
    starts = _starts(np.asarray(out["offset_mapping"], dtype=np.int64).reshape(-1, 2))
    mask = np.zeros(len(starts), dtype=bool)
    for begin, end in spans:
        mask |= (starts >= begin) & (starts < end)
    return np.asarray(out["input_ids"], dtype=np.int64), mask


def _starts(offsets: np.ndarray) -> np.ndarray:
    """The character at which each token [T, 2] starts, int64 [T].

    Byte-level tokenizers that trim their offsets leave nothing of a token of blanks, but a place after it: it starts where the
    token before it ended.
    """
    starts, ends = offsets.T
    before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
    return np.where(starts == ends, np.minimum(before, starts), starts)
