"""Paths as people type them. A shell leaves the ~ of `key=~/x` alone, so it is expanded here."""

from __future__ import annotations

import os
from pathlib import Path


def local(path: str | Path) -> Path:
    """`path` with ~ and ~NAME as that user's home; where there is no such user it stays as typed, a name like any other."""
    return Path(os.path.expanduser(path))
