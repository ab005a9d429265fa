"""`stage`: what long work shows while it lasts, wherever it is done. A bar in a terminal, a few plain lines elsewhere.

Everything goes to stderr: stdout is for results, which may be parsed. Without a terminal a stage that is over within two seconds
says nothing; one that lasts says that it began, how far it is every half a minute, and how long it took. NO_COLOR and TERM=dumb
are rich's to honour. Bars of stages within stages share one display, as two would overwrite each other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, Thread
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

T = TypeVar("T")
FIRST = 2.0
"""Seconds before the first plain line."""
EVERY = 30.0
"""Seconds between further ones."""
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_shared: list[Progress] = []
"""The display of the stages that are open now, at most one."""


class Stage:
    """How far some work is: `done` of `total` units, where a total is known."""

    def __init__(self, words: str, total: float | None, unit: str) -> None:
        self.words, self.total, self.unit = words, total, unit
        self.done, self.remark, self._start = 0.0, "", time.monotonic()

    def advance(self, count: float = 1) -> None:
        """So many more units are done."""
        self.done += count

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, one unit each, done when the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._start

    def progress(self) -> str:
        """`12 of 40 windows, 0:35 left`; empty before anything is done."""
        if not self.done:
            return self.remark
        unit = f" {self.unit}" if self.unit else ""
        if self.total is None:
            words = f"{self.done:,.0f}{unit}"
        else:
            left = self.seconds * max(self.total - self.done, 0) / self.done
            words = f"{self.done:,.0f} of {self.total:,.0f}{unit}, {clock(left)} left"
        return f"{words}, {self.remark}" if self.remark else words


@contextmanager
def stage(words: str, total: float | None = None, unit: str = "") -> Iterator[Stage]:
    """Show that `words` is being done for as long as it is open.

    Args:
        total: how many units there are; None: it is not known.
        unit: what is counted, in the plural.
    """
    one = Stage(words, total, unit)
    if _quiet.get():
        yield one
    else:
        with _bar(one) if in_terminal() else _lines(one):
            yield one


def tracked(items: Sequence[T], words: str, unit: str = "") -> Iterator[T]:
    """A loop as a stage, a unit each."""
    with stage(words, len(items), unit) as one:
        yield from one.each(items)


@contextmanager
def quietly(when: bool = True) -> Iterator[None]:
    """Stages within show nothing, where `when` says so; an outer one that is quiet stays so."""
    token = _quiet.set(_quiet.get() or when)
    try:
        yield
    finally:
        _quiet.reset(token)


def in_terminal() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal


def clock(seconds: float) -> str:
    """`0:07`, `12:40`, `3:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Words(TextColumn):
    """What the stage itself says of its progress, as it stands when the line is drawn."""

    def render(self, task: Task) -> Text:
        one: Stage = task.fields["stage"]
        task.completed = one.done
        return Text(one.progress(), overflow="ellipsis", no_wrap=True)


def _display() -> Progress:
    words = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=30))
    progress = _Words("", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    columns = (SpinnerColumn(), words, progress, BarColumn(12), TimeElapsedColumn())
    redirected = sys.stdout.isatty()  # a pipe gets what is printed, as it is
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, expand=True, redirect_stdout=redirected, redirect_stderr=True)


@contextmanager
def _bar(one: Stage) -> Iterator[None]:
    outer = bool(_shared)
    if not outer:
        _shared.append(_display())
        _shared[0].start()
    task: TaskID = _shared[0].add_task(one.words, total=one.total, stage=one)
    try:
        yield
    finally:
        _shared[0].remove_task(task)
        if not outer:
            _shared.pop().stop()


@contextmanager
def _lines(one: Stage) -> Iterator[None]:
    ended, said = Event(), Event()
    ticker = Thread(target=_tick, args=(one, ended, said), daemon=True)
    ticker.start()
    try:
        yield
        if said.is_set():
            ended.set()
            _say(f"{one.words}: {clock(one.seconds)}")
    finally:
        ended.set()
        ticker.join()


def _tick(one: Stage, ended: Event, said: Event) -> None:
    if ended.wait(FIRST):
        return
    said.set()
    _say(f"{one.words} ...")
    while not ended.wait(EVERY):
        _say(f"{one.words}: {one.progress() or clock(one.seconds)}")


def _say(line: str) -> None:
    print(f"qat: {line}", file=sys.stderr, flush=True)
