"""Two ranks on this machine's loopback that are started once and then sent one function after another.

A function is one of a test's module; it runs on both ranks at once, which are joined by gloo, and returns what can be pickled.
What does not answer in time is killed, and the next function gets new ranks: a hang fails one test and no other.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from qat.parallel.group import free_port, joined

STARTED = 240.0
"""Seconds in which ranks must have started."""


class Failed(AssertionError):
    """A rank raised what nobody expected, or did not answer."""


class Pair:
    """Call it with a function: a result of each rank. `failures` is for functions that raise."""

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self._ranks: list[tuple[Any, Connection]] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any, seconds: float = 60.0) -> list[Any]:
        """The function's result on each rank."""
        answers = self._asked(function, arguments, seconds)
        for rank, (raised, _, trace) in enumerate(answers):
            if raised is not None:
                raise Failed(f"rank {rank}: {trace}")
        return [result for _, result, _ in answers]

    def failures(self, function: Callable[..., Any], *arguments: Any, seconds: float = 60.0) -> list[str | None]:
        """`ValueError: its words` of each rank; None of one that did not raise."""
        return [raised for raised, _, _ in self._asked(function, arguments, seconds)]

    def close(self) -> None:
        """End the ranks, however busy they are."""
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self._ranks = []

    def _asked(self, function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> list[Any]:
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send((function, arguments))
        return self._answers(seconds)

    def _answers(self, seconds: float) -> list[Any]:
        found, until = [], time.monotonic() + seconds
        for rank, (process, pipe) in enumerate(self._ranks):
            try:
                if not pipe.poll(max(until - time.monotonic(), 0)):
                    raise Failed(f"rank {rank} did not answer within {seconds} seconds")
                found.append(pipe.recv())
            except (EOFError, OSError) as error:
                self.close()
                raise Failed(f"rank {rank} ended with code {process.exitcode}") from error
            except Failed:
                self.close()
                raise
        return found

    def _start(self) -> None:
        context, port = multiprocessing.get_context("spawn"), free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, port, theirs)
            )  # no daemon: what reads chats has a process
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        atexit.register(self.close)
        self._answers(STARTED)


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    with joined():
        pipe.send((None, None, None))
        while True:
            function, arguments = pipe.recv()
            pipe.send(_answer(function, arguments))


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str | None, Any, str | None]:
    torch.manual_seed(0)
    try:
        return None, function(*arguments), None
    except BaseException as error:
        return f"{type(error).__name__}: {error}", None, traceback.format_exc()
