"""Damaged files are read in forked processes: one that crashes, hangs or eats the memory is a failure, not the end.

A batch is a fork, which takes a few milliseconds; each mutation has 20 seconds, and the process 4 GiB more than it began with.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from faults.cases import Case

BATCH = 50
SECONDS = 20
MEMORY = 4 << 30
Mutation = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Reader:
    """One kind of file and what reads it."""

    file: str
    """What is damaged, within the folder of samples."""
    mutate: Mutation
    read: Callable[[Path], Any]
    """Called with the folder."""
    same: Callable[[Any, Any], bool]
    """Whether what was read may stand beside what the whole file gives: equal, where a sum can tell."""
    count: int = 500


def readers_cases(readers: dict[str, Reader], folder: Path) -> Iterator[Case]:
    """Batches of every reader."""
    for name, reader in readers.items():
        for start in range(0, reader.count, BATCH):
            count = min(BATCH, reader.count - start)
            seeds = range(start, start + count)
            yield Case(f"{name}: {reader.file} damaged", f"{name} {start}", partial(batch, reader, folder, seeds), count)


def batch(reader: Reader, folder: Path, seeds: range) -> list[str]:
    """A line for each failure."""
    return forked(folder, lambda place, log: _read_all(reader, place, seeds, log))


def forked(folder: Path, work: Callable[[Path, TextIO], None]) -> list[str]:
    """`work` on a copy of `folder` in a process of its own, whose log has a line `! ...` for each failure."""
    place = folder.with_name(f"batch-{os.getpid()}")
    shutil.copytree(folder, place, symlinks=True)
    log = place / "log.txt"
    child = os.fork()
    if child == 0:
        _work(work, place, log)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    shutil.rmtree(place)
    wrong = [line.removeprefix("! ") for line in lines if line.startswith("! ")]
    if status != 0:
        reached = next((line for line in reversed(lines) if line.startswith("seed")), "before the first")
        wrong.append(f"the process ended with {_ending(status)} at {reached}")
    return wrong


def _work(work: Callable[[Path, TextIO], None], place: Path, log: Path) -> NoReturn:
    with log.open("w", buffering=1) as lines:
        try:
            _limit()
            with _quiet():
                work(place, lines)
        except BaseException as error:
            print(f"! the whole file is not read: {type(error).__name__}: {' '.join(str(error).split())}", file=lines)
    os._exit(0)


def _ending(status: int) -> str:
    return (
        f"{signal.Signals(-status).name}{', which means a hang' if status == -signal.SIGALRM else ''}"
        if status < 0
        else str(status)
    )


def _limit() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read_all(reader: Reader, folder: Path, seeds: range, lines: TextIO) -> None:
    file = folder / reader.file
    whole, expected = file.read_bytes(), reader.read(folder)
    if not reader.same(expected, reader.read(folder)):
        print("! the whole file is not read as itself", file=lines)
    for seed in seeds:
        print(f"seed {seed}", file=lines)
        _replace(file, reader.mutate(whole, random.Random(seed)))
        signal.alarm(SECONDS)
        if wrong := outcome(lambda: reader.same(reader.read(folder), expected)):
            print(f"! {wrong} (seed {seed})", file=lines)
        signal.alarm(0)


@contextmanager
def _quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        yield


def _replace(file: Path, data: bytes) -> None:
    """A new file: what is mapped of the last one keeps its bytes."""
    file.unlink()
    file.write_bytes(data)


def outcome(read: Callable[[], bool]) -> str:
    """What is wrong with how a reader ended: '' where it refused in one line, or read what was written."""
    try:
        return "" if read() else "read as something else"
    except (ValueError, OSError) as error:
        text = str(error)
        if not text or len(text) > 2000 or "\n" in text:
            return f"{type(error).__name__} is not one line: {text[:300]!r}"
        return ""
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(where.filename).name}:{where.lineno})"
