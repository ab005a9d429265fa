"""Temporary siblings of a target: names that no other process gets, and which of them a killed process left.

    .NAME.partial-PID-RANDOM-HOST     being filled, or what an exchange put aside
    .NAME.replaced-PID-RANDOM-HOST    the old folder, where the file system cannot exchange two

A process number alone is no name: in a container every run has the same. Whoever fills a sibling holds a lock on it (flock),
which the kernel drops with the process; a sibling is left over if its lock is free. Where a file system has no locks, it is left
over if its process is gone from this host; of another host's it is not known, so such a one stays.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PARTIAL, REPLACED = "partial", "replaced"
_live: set[str] = set()
"""Names of this process, which have no lock for a moment."""


def sibling(target: Path, kind: str) -> Path:
    """A new name beside `target`; `kind` is PARTIAL or REPLACED."""
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}-{_host()}")


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname()) or "host"


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it as ours until the end, whatever name it has got by then."""
    with _named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        with _lock(folder):
            yield


@contextmanager
def held(folder: Path, name: Path) -> Iterator[None]:
    """Hold `folder`, which is about to get the temporary `name`, as ours until the end."""
    with _named(name), _lock(folder):
        yield


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    _live.add(folder.name)
    try:
        yield
    finally:
        _live.discard(folder.name)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    handle = _locked(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def left_over(target: Path, kind: str) -> list[Path]:
    """The siblings of `target` that killed processes left, oldest first."""
    return _left(target.parent, re.escape(target.name), kind)


def _left(folder: Path, name: str, kind: str) -> list[Path]:
    found = re.compile(rf"\.{name}\.{kind}-(\d+)-[0-9a-f]+-(.+)")
    siblings = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = found.fullmatch(path.name)
        if match and path.name not in _live and _abandoned(path, int(match[1]), match[2]):
            siblings.append(path)
    return sorted(siblings, key=_time)


def sweep(target: Path) -> None:
    """Remove what killed processes left of `target`. What cannot be removed stays: it is in nobody's way."""
    for path in left_over(target, PARTIAL):
        shutil.rmtree(path, ignore_errors=True)


def sweep_folder(folder: Path) -> None:
    """`sweep` for every target in `folder`, also those that will not be written again."""
    for path in _left(folder, ".+", PARTIAL):
        shutil.rmtree(path, ignore_errors=True)


def _time(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _locked(folder: Path) -> int | None:
    """A handle that holds the folder's lock; None where the file system has none, or another process holds it."""
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except OSError:
        if handle is not None:
            os.close(handle)
        return None


def _abandoned(folder: Path, process: int, host: str) -> bool:
    if host == _host() and not _runs(process):
        return True
    handle = _locked(folder)
    if handle is None:
        return False
    os.close(handle)
    return True


def _runs(process: int) -> bool:
    if fcntl is None:  # on Windows, os.kill kills
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is someone else's
        return True
    return True
