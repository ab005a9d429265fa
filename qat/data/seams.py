"""Long documents in pieces, with exactly the tokens that the tokenizer gives for the whole text.

Pieces cannot be tokenized one by one: SentencePiece-like tokenizers begin each with a space of their own, and a merge, a
run of digits or a rule that looks ahead may reach over the cut. So each piece begins with the last OVERLAP characters of the one
before, which are thus tokenized twice, in two contexts. In the middle of them, thousands of characters from either end, a place
is sought around which RUN tokens are equal in id and position both times: what lies left of it is taken from the one, what lies
right of it from the other. A token boundary there means that nothing reached over it; that it is found in two contexts means
that it depends on neither. Where there is none (one word of a million characters) the two pieces are tokenized as one.

The rejected way, a copy of the tokenizer without its prefix space, would have to know every normalizer and pre-tokenizer, and
would lose the spaces that belong after special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

OVERLAP = 1 << 14  # characters
RUN = 64  # tokens

Encode = Callable[[list[str]], list[Any]]
"""Texts to `tokenizers.Encoding`s, without special tokens."""


@dataclass
class _Part:
    """A tokenized text, of which the tokens before `first` have been given already."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    first: int = 0

    @classmethod
    def of(cls, text: str, encoding: Any) -> _Part:
        return cls(text, encoding.ids, encoding.offsets)


def encode_pieces(pieces: Iterable[tuple[str, bool]], encode: Encode) -> Iterator[tuple[list[int], bool]]:
    """Yield `(ids, ends)`: tokens of documents given in pieces `(text, ends)`; texts are tokenized in batches, for all cores."""
    left: _Part | None = None
    for batch in _batches(_overlapping(pieces)):
        for (text, shared, ends), encoding in zip(batch, encode([text for text, _, _ in batch]), strict=True):
            if left is None and ends:  # a whole document
                yield encoding.ids, True
                continue
            part = _Part.of(text, encoding)
            if left is not None:
                ids, part = _joined(left, part, shared, encode)
                yield ids, False
            if ends:
                yield part.ids[part.first :], True
            left = None if ends else part


def _overlapping(pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, int, bool]]:
    """`(text, shared, ends)`: each piece of a document after the first begins with `shared` characters of the one before."""
    before = ""
    for text, ends in pieces:
        yield before + text, len(before), ends
        before = "" if ends else (before + text)[-OVERLAP:]


def _batches(pieces: Iterable[tuple[str, int, bool]], characters: int = 1 << 22) -> Iterator[list[tuple[str, int, bool]]]:
    batch: list[tuple[str, int, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= characters or len(batch) >= 4096:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _joined(left: _Part, right: _Part, shared: int, encode: Encode) -> tuple[list[int], _Part]:
    """The left's tokens up to the seam, and what goes on from there."""
    seam = _seam(left, right, len(left.text) - shared, shared)
    if seam is not None:
        right.first = seam[1]
        return left.ids[left.first : seam[0]], right
    text = left.text + right.text[shared:]
    whole = _Part.of(text, encode([text])[0])
    whole.first = left.first
    return [], whole


def _seam(left: _Part, right: _Part, base: int, shared: int) -> tuple[int, int] | None:
    """Indices of one token in both, as near to the middle of the overlap as can be. `base`: where right begins in left."""
    places = {start: index for index, (start, _) in reversed(list(enumerate(right.offsets))) if start <= shared}
    candidates = [
        (abs(start - base - shared // 2), index, places[start - base])
        for index, (start, _) in enumerate(left.offsets)
        if base + shared // 4 <= start <= base + 3 * shared // 4 and start - base in places
    ]
    half = RUN // 2
    for _, i, j in sorted(candidates):
        if i - half >= left.first and j >= half and _equal(left, i, right, j, base, half):
            return i, j
    return None


def _equal(left: _Part, i: int, right: _Part, j: int, base: int, half: int) -> bool:
    ours, theirs = slice(i - half, i + half), slice(j - half, j + half)
    moved = [(start + base, end + base) for start, end in right.offsets[theirs]]
    return len(moved) == 2 * half and left.ids[ours] == right.ids[theirs] and left.offsets[ours] == moved
