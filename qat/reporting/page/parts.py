"""What a section of the page is made of: tables, plotly's figures, texts and commands, as records that the template writes out.

Colours of a figure are names of the style sheet's variables (`--blue`): the page gives them their light or dark values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SERIES = ("--blue", "--orange", "--green", "--purple", "--red", "--teal", "--pink", "--olive")
"""Colours of lines, in the order they are given out."""
MOST_ROWS = 60
"""Of one table; how many more there are is said below it."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    below: str = ""
    """A second, quiet line: a delta."""
    tone: str = ""
    """`good`, `bad` or `warn`."""
    bar: float | None = None
    """A bar of this share of the cell's width."""
    number: bool = True
    """Stands right."""


@dataclass(frozen=True)
class Table:
    """A table; its first column are names."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    kind: str = "table"

    @property
    def shown(self) -> Sequence[Sequence[Cell]]:
        """The rows that are written out."""
        return self.rows[:MOST_ROWS]

    @property
    def hidden(self) -> int:
        """How many are not."""
        return max(0, len(self.rows) - MOST_ROWS)


@dataclass(frozen=True)
class Figure:
    """plotly's data and layout; what all figures share is in page.js."""

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    caption: str = ""
    height: int = 320
    small: bool = False
    """Stands beside others."""
    kind: str = "figure"


@dataclass(frozen=True)
class Lines:
    """Sentences, a line each; `tone` colours the mark before them."""

    lines: Sequence[str]
    tone: str = ""
    kind: str = "lines"


@dataclass(frozen=True)
class Command:
    """Something to be copied into a terminal."""

    words: str
    text: str
    kind: str = "command"


@dataclass(frozen=True)
class Texts:
    """Texts side by side: `columns` are who wrote them, `rows` a prompt and its continuations."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    kind: str = "texts"


Block = Table | Figure | Lines | Command | Texts


@dataclass(frozen=True)
class Section:
    """A section of the page; without blocks it is the line `absent`, and without that it is left out."""

    key: str
    title: str
    blocks: Sequence[Block] = ()
    absent: str = ""
    about: str = ""


def name_cell(text: str, below: str = "") -> Cell:
    """A cell of words."""
    return Cell(text, below, number=False)


def megabytes(size: float) -> str:
    """Bytes, for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:,.0f} B"


def seconds_in_words(seconds: float) -> str:
    """A length of time, for people."""
    if not math.isfinite(seconds):
        return "unknown"
    for unit, scale in (("h", 3600), ("min", 60)):
        if seconds >= scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds:,.1f} s"
