"""The last step of a write: bytes on the disk, then one rename.

A folder in the way of another cannot be replaced by rename(2). Linux can exchange two names in one step (renameat2 with
RENAME_EXCHANGE); elsewhere, and on file systems that refuse it, two renames do it, and `repair` undoes a half of them.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_REFUSED = {errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EPERM, errno.ENOTSUP}


def sync(path: Path) -> None:
    """A file's bytes, or a folder's names, on the disk. Folders cannot be opened everywhere; then nothing is to be done."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # no such thing on this file system
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync` of all files and folders in `folder`, itself the last."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(path, name))
        sync(Path(path))


def exchange(one: Path, two: Path) -> bool:
    """Let two paths change their names in one step; False where it cannot be done, and nothing was."""
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _REFUSED:
        return False
    raise OSError(number, os.strerror(number), str(two))


@cache
def _renameat2() -> Any:
    try:
        found = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # no glibc of 2018 or later; Windows
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return found
