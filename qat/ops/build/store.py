"""Where compiled libraries are kept, and the sources they come from.

A library lies in $QAT_BUILD_DIR (~/.cache/qat/build) in a folder named after everything that went into it, so nothing
stale is ever loaded. A file lock of the operating system guards a build: it ends with the process that holds it
(torch's own lock file outlives a killed build for ever), and a folder counts only once its `done` file is there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    """Where built libraries are kept."""
    return Path(os.environ.get("QAT_BUILD_DIR") or Path.home() / ".cache" / "qat" / "build")


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
    """Whether the folder holds a finished library."""
    return (folder / "done").exists()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder's build.

    Raises:
        BuildError: the folder cannot be read or written.
    """
    try:
        build_root().mkdir(parents=True, exist_ok=True)
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
