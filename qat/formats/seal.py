"""Checksums of a whole folder, config and tokenizer included, in a file that `sha256sum -c qat.sha256` reads, too.

Stock readers do not know the file and leave it alone; transformers' save_pretrained copies a model without it, and the copy is
then not sealed. A file that is not there is no damage: whoever needs it says so, and a copy of some files still loads.
Rejected: sums inside config.json, which cannot hold its own, and which transformers writes again in other words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qat import storage

SUMS = "qat.sha256"
UNSEALED = "not sealed: written by an earlier version, or by another program"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\\/\n]+)")
_CARD = ".md"
"""Of files for people, which no reader takes: edited, they make no other model."""


@dataclass(frozen=True)
class Seal:
    """What the checksums of a file or folder say. `altered` names what is not as it was written; other changes are `noted`."""

    sealed: bool
    altered: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.sealed:
            return UNSEALED
        changes = ([f"altered: {', '.join(self.altered)}"] if self.altered else []) + list(self.noted)
        return "; ".join(changes) or "intact"

    def refuse(self, path: str | Path) -> None:
        """Raise ValueError, with the way out, for what was altered."""
        if self.altered:
            raise ValueError(
                f"{path} is not as it was written: {', '.join(self.altered)} altered; copy it again, or, if that was on purpose,"
                f" say `python -m qat.inspect {path} --reseal`"
            )


def write_sums(folder: Path) -> None:
    """Seal a folder as it is now."""
    sums = {file.name: sha256(file) for file in _files(folder)}
    storage.write_text(folder / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def folder_seal(folder: Path) -> Seal:
    """Compare a folder with its checksums.

    Raises:
        ValueError: the sums themselves are damaged.
    """
    if not (folder / SUMS).is_file():
        return Seal(False)
    sums, files = read_sums(folder / SUMS), {file.name: file for file in _files(folder)}
    changed = [name for name in sums if name in files and sha256(files[name]) != sums[name]]
    notes = {
        "the model card was edited": [name for name in changed if name.endswith(_CARD)],
        "gone": sums.keys() - files.keys(),
        "not sealed": files.keys() - sums.keys(),
    }
    noted = tuple(f"{what}: {', '.join(sorted(names))}" for what, names in notes.items() if names)
    return Seal(True, tuple(name for name in changed if not name.endswith(_CARD)), noted)


def refuse_altered(folder: Path) -> None:
    """Raise ValueError where a file of a sealed folder is not the one that was written."""
    folder_seal(folder).refuse(folder)


def read_sums(file: Path) -> dict[str, str]:
    """name -> SHA-256; ValueError for a line that `write_sums` does not write."""
    sums: dict[str, str] = {}
    try:
        *lines, end = file.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    for line in lines:
        found = _LINE.fullmatch(line)
        if found is None or found[2] in sums:
            raise ValueError(f"{file} is damaged: {line[:100]!r} is no checksum and name")
        sums[found[2]] = found[1]
    if end or not sums:
        raise ValueError(f"{file} is damaged: it is cut off")
    return sums


def sha256(file: Path) -> str:
    """Hexadecimal."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return (file for file in folder.iterdir() if file.is_file() and file.name != SUMS and not file.name.startswith("."))
