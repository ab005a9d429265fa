"""SIGINT, SIGTERM and SIGHUP from the first moment of a run to its last: which exit code, and when it ends.

While steps are trained the first signal waits for the end of the step, where a checkpoint is exact; anywhere else, and for the
second one, it raises `Interrupted`. A run that a signal ended exits with 128 + its number, as shells expect it of any program.
A hang-up that was ignored when the process began (nohup) stays ignored.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
WORDS = b"\nStopping after this step and saving a checkpoint; once more stops at once.\n"


ECHO = 3.0
"""Seconds after the first signal in which a rank takes further ones for the same."""


class Interrupted(SystemExit):
    """A signal ended the run. Nobody need catch it: it exits with 128 + `number` and prints nothing."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        """It travels between processes."""
        return Interrupted, (self.number,)


class Signals:
    """What signals asked for: `asked` is the first one's number while training waits for the end of its step.

    Args:
        leave: end the process where a signal finds it, instead of raising. An exception in the middle of an import is
            caught by whoever then tries another module, or leaves half of one behind.
    """

    def __init__(self, leave: bool = False) -> None:
        self.asked: int | None = None
        self._leaves, self._waits, self._process = leave, False, os.getpid()
        self._when = -ECHO
        self._numbers = [number for number in NUMBERS if not _is_nohup(number)]

    def listen(self) -> None:
        """Take the handlers, again where a library has put its own in between; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                signal.signal(number, self._handle)

    @contextmanager
    def wait_for_step(self) -> Iterator[None]:
        """Within, the first signal is noted in `asked`."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return _of_child(number)
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        if self._leaves:
            _leave(number)
        if self._is_echo():
            return
        if not self._waits or self.asked is not None:
            raise Interrupted(self.asked or number)
        self.asked = number
        with suppress(OSError):
            os.write(1, WORDS if _speaks() else b"")  # print is not reentrant, and this may come within one

    def _is_echo(self) -> bool:
        """A terminal signals all processes, and a launcher hands on what it gets itself: one wish reaches a rank twice."""
        now, before = time.monotonic(), self._when
        self._when = before if now - before < ECHO else now
        return now - before < ECHO and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _speaks() -> bool:
    """Of several processes the first."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _is_nohup(number: int) -> bool:
    """SIGINT is ignored in whatever a script starts with &, which is no wish to survive one that is sent to it."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


def _leave(number: int) -> NoReturn:
    with suppress(OSError):
        os.write(2, f"qat.train: interrupted by signal {number}\n".encode() if _speaks() else b"")
    os._exit(128 + number)


def _of_child(number: int) -> None:
    """A loader's process: Ctrl-C reaches it too and is its parent's to decide, anything else ends it."""
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _leave_terminal() -> None:
    """The terminal is gone, and a print to it would be an error on the way out."""
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextmanager
def listening(leave: bool = False) -> Iterator[Signals]:
    """Signals of a run; the handlers from before are given back. `leave` is that of `Signals`."""
    found, main = Signals(leave), threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in NUMBERS}
    found.listen()
    try:
        yield found
    finally:
        for number, handler in before.items() if main else ():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
