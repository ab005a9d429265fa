"""Write a file or a folder so that partial work never looks whole: fill a temporary sibling, put it on the disk, rename it.

A process may be killed between any two steps: the target is then what it was, or what it was to become, and the next write sweeps
what is left. Rejected: writing in place with a journal, which every reader would have to know.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qat.storage.exchange import exchange, sync, sync_tree
from qat.storage.names import PARTIAL, REPLACED, held, left_over, made, sibling, sweep


@contextmanager
def new_folder(target: Path, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill, which replaces `target` on success and vanishes on any error.

    Args:
        check: called with the filled folder before it gets its name.

    Raises:
        OSError: the disk refuses.
    """
    repair(target)
    sweep(target)
    partial = sibling(target, PARTIAL)
    try:
        with made(partial):
            yield partial
            if check is not None:
                check(partial)
            sync_tree(partial)
            _replace(target, partial)
            sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after an exchange, this is the old one


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield the path of a file to write, of the same name elsewhere; it replaces `target` on success, vanishes on any error.

    Raises:
        OSError: the disk refuses, or `target` is a folder.
    """
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder, and a file is to be written; give the file's name")
    sweep(target)
    folder = sibling(target, PARTIAL)
    try:
        with made(folder):
            yield folder / target.name
            sync(folder / target.name)
            os.replace(folder / target.name, target)
            sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all. OSError where the disk refuses."""
    with new_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


def repair(target: Path) -> None:
    """Give a folder its name back that a process moved aside and, being killed, did not replace."""
    for old in reversed(left_over(target, REPLACED)):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def _replace(target: Path, partial: Path) -> None:
    if not target.exists():
        partial.rename(target)
    elif not exchange(partial, target):
        _replace_by_two(target, partial)


def _replace_by_two(target: Path, partial: Path) -> None:
    """Move the old one aside, and back if the new one cannot take its place."""
    old = sibling(target, REPLACED)
    with held(target, old):
        target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
