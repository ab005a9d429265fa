"""Where compiled libraries are kept, and the sources they come from.

A library lies in $QAT_BUILD_DIR (~/.cache/qat/build) in a folder named after everything that went into it, so nothing
stale is ever loaded. A file lock of the operating system guards a build: it ends with the process that holds it
(torch's own lock file outlives a killed build for ever), and a folder counts only once its `done` file is there.

A library runs as whoever loads it, so only what nobody else could have put there is loaded: folders and files that belong to
this user or to root and that no other may write. A place that others may write is left alone, and another one is taken.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the message is one line for users."""


def source_folder() -> Path:
    """csrc: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"the folder csrc is missing beside {package}; the installation is incomplete")


def matching(folder: Path, *patterns: str) -> list[Path]:
    """The files of csrc that patterns name, in a fixed order. csrc/emulation is for tests: no build names it."""
    return [file for pattern in patterns for file in sorted(folder.glob(pattern))]


def build_root() -> Path:
    """Where built libraries are kept: $QAT_BUILD_DIR, or a place of this user's own where others may write that."""
    wanted = Path(os.environ.get("QAT_BUILD_DIR") or _own_root())
    why = _open_way(wanted) or _open(wanted)
    return wanted if why is None else _elsewhere(wanted, why)


def _own_root() -> Path:
    return Path.home() / ".cache" / "qat" / "build"


@lru_cache
def _elsewhere(wanted: Path, why: str) -> Path:
    """The user's own place, or where that is open, too, one for this process alone."""
    place = _own_root()
    if place == wanted or _open_way(place) or _open(place):
        place = Path(tempfile.mkdtemp(prefix="qat-build-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
    print(f"qat: no kernels are loaded from {wanted}: {why}; {place} is used instead", file=sys.stderr, flush=True)
    return place


def _open(path: Path) -> str | None:
    """Why others could have written what is at `path`; None where they could not, or nothing is there."""
    try:
        about = path.stat()
    except OSError:
        return None
    if about.st_uid not in (0, os.getuid()):
        return f"{path} belongs to another user"
    return f"{path} can be written by others" if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def _open_way(path: Path) -> str | None:
    """Why others could put another folder in the place of `path`: a folder above where all may rename what they like."""
    for folder in path.absolute().parents:
        try:
            mode = folder.stat().st_mode
        except OSError:
            continue
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"{folder} can be written by others"
    return None


def fresh(folder: Path) -> None:
    """Make an empty folder of this user's alone, in place of whatever is there."""
    if folder.exists():
        aside = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
        folder.rename(aside / folder.name)
        shutil.rmtree(aside, ignore_errors=True)
    folder.mkdir(mode=0o755, parents=True)
    folder.chmod(0o755)


def finish(folder: Path, version: str) -> None:
    """Say that the library in the folder is finished, and let nobody else write it, whatever the umask was."""
    (folder / "done").write_text(version)
    for file in folder.rglob("*"):
        file.chmod(file.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))


def digest(*parts: str | bytes) -> str:
    """16 hexadecimal digits of the parts' SHA-256."""
    return hashlib.sha256(b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)).hexdigest()[:16]


def content_key(files: Iterable[Path], flags: Iterable[str]) -> str:
    """Digest of sources, flags, torch's version and the machine."""
    content = [part for file in files for part in (file.name, file.read_bytes())]
    return digest(torch.__version__, platform.machine(), *flags, *content)


def version_line(compiler: str, line: int) -> str:
    """That line of what `compiler --version` prints, 0 for the first and -1 for the last."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown"])[line]


def is_done(folder: Path) -> bool:
    """Whether the folder holds a finished library that nobody else could have written."""
    if not (folder / "done").exists():
        return False
    why = next((why for path in (folder, *folder.iterdir()) if (why := _open(path))), None)
    if why is not None:
        _say_once(f"qat: the kernels in {folder} are not loaded: {why}")
    return why is None


@lru_cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder's build.

    Raises:
        BuildError: the folder cannot be read or written.
    """
    try:
        build_root().mkdir(mode=0o755, parents=True, exist_ok=True)
        with (build_root() / f"{folder.name}.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise BuildError(f"cannot use {folder}: {error}; set QAT_BUILD_DIR to a folder that can be written") from error


def failure(log: Path, output: str) -> BuildError:
    """The error of a compiler that printed `output`, which is kept in `log`."""
    log.write_text(output)
    found = re.search(r"^.*\b(?:error|fatal)\s*:.*$", output, re.IGNORECASE | re.MULTILINE)
    reason = found[0] if found else output.partition("\n")[0]
    return BuildError(f"compiling failed: {reason.strip()[:300]} (all of it in {log})")
