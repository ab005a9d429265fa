"""A checksum at the end of a .pt2 file: SHA-256 of all bytes before it, as the zip archive's comment, which torch passes over."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from qat.formats.seal import Seal

MARK = "extra/writer"
WRITER = "qat sha256"
"""What the entry MARK holds in a sealed file; earlier ones hold `qat`."""
_BEFORE, _LENGTH = b"sha256 ", 64


def mark(file: Path, folder: str) -> None:
    """Say in the archive who wrote it, and seal it. No time of day is written."""
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(zipfile.ZipInfo(f"{folder}/{MARK}"), WRITER)
        archive.comment = _BEFORE + b"0" * _LENGTH
    with file.open("r+b") as data:
        text = _sum(file).encode()
        data.seek(-_LENGTH, 2)
        data.write(text)


def is_ours(file: Path) -> bool:
    """Whether an export of ours wrote it, sealed or not."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith(f"/{MARK}") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def seal(file: Path) -> Seal:
    """Compare a file with its checksum; zipfile.BadZipFile where it is no archive."""
    with zipfile.ZipFile(file) as archive:
        writer = next((name for name in archive.namelist() if name.endswith(f"/{MARK}")), None)
        if writer is None or archive.read(writer).decode(errors="replace") != WRITER:
            return Seal(False)
        intact = archive.comment == _BEFORE + _sum(file).encode()
    return Seal(True, () if intact else ("its bytes",))


def _sum(file: Path) -> str:
    found, left = hashlib.sha256(), file.stat().st_size - _LENGTH
    with file.open("rb") as data:
        while left > 0 and (piece := data.read(min(left, 1 << 20))):
            found.update(piece)
            left -= len(piece)
    return found.hexdigest()
