"""checkpoints/last.ckpt and the one before it: written whole, sealed with a checksum, checked before they are used.

The file is a zip archive as torch writes it, and the checksum is its archive comment: sha256 of all bytes before it. So there is
one file, with one rename, and torch reads it as any other. torch itself checks no sums: bits that flipped on a disk would go into
the weights. Rejected: a file for the sum beside it, as a kill between two renames would make a whole checkpoint look damaged.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from qat import parallel
from qat.storage import new_file

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_MARK = b"qat sha256 "
_COMMENT = len(_MARK) + 64
_END = b"PK\x05\x06"


@dataclass(frozen=True)
class Found:
    """A checkpoint that was checked."""

    file: Path
    step: int


def save(trainer: pl.Trainer, folder: Path) -> None:
    """Write folder/last.ckpt; what it was becomes previous.ckpt once the new one is whole and on the disk.

    All ranks of a run call it: what of the model and the optimizer lies in parts is gathered, and rank 0 writes it.

    Raises:
        OSError: the disk refuses, on other ranks than 0 ValueError; both files are then what they were.
    """
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    parallel.shared(lambda: _write(checkpoint, folder))


def _write(checkpoint: dict[str, Any], folder: Path) -> None:
    with new_file(folder / LAST) as partial:
        TorchCheckpointIO().save_checkpoint(checkpoint, partial)
        seal(partial)
        if (folder / LAST).exists():
            _keep(folder, partial.with_name(PREVIOUS))


class WholeFiles(TorchCheckpointIO):
    """lightning's files of whatever writes checkpoints (ModelCheckpoint), whole or not at all.

    A file is removed only once a last.ckpt that no longer names it is on the disk: a run that is killed before goes on from one
    whose best checkpoint is still there.
    """

    def __init__(self) -> None:
        self._unwanted: list[Path] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replaces the file of that name once the new one is on the disk; where that refuses (OSError) it is what it was."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with new_file(Path(path)) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)
        self._unwanted = [file for file in self._unwanted if file != Path(path)]

    def remove_checkpoint(self, path: str | Path) -> None:
        """Soon."""
        self._unwanted.append(Path(path))

    def remove_unwanted(self) -> None:
        """Now."""
        for file in self._unwanted:
            super().remove_checkpoint(file)
        self._unwanted = []


def _keep(folder: Path, second: Path) -> None:
    """A second name for last.ckpt, so that there is a last.ckpt at every moment; a copy's time and space are not spent."""
    try:
        os.link(folder / LAST, second)
    except OSError:  # a file system without hard links
        os.replace(folder / LAST, folder / PREVIOUS)
    else:
        os.replace(second, folder / PREVIOUS)


def newest(folder: Path, *, say: bool = False) -> Found | None:
    """The newest checkpoint of `folder` that is whole; None where there is none at all.

    Args:
        say: print what is wrong with last.ckpt where previous.ckpt takes its place.

    Raises:
        ValueError: there are checkpoints, and each is damaged.
    """
    wrong = ""
    for file in (folder / LAST, folder / PREVIOUS):
        if not file.exists():
            wrong = wrong or f"{file} is missing"
            continue
        try:
            found = Found(file, read_step(file))
        except ValueError as error:
            wrong = str(error)
            continue
        if wrong and say:
            print(f"{wrong}; going on from {file.name}, step {found.step}", flush=True)
        return found
    if (folder / LAST).exists() or (folder / PREVIOUS).exists():
        raise ValueError(wrong)
    return None


def seal(file: Path) -> None:
    """Write the sum of a zip archive without a comment into its comment."""
    with file.open("r+b") as archive:
        archive.seek(-22, os.SEEK_END)
        end = archive.read(22)
        if not end.startswith(_END) or end[20:] != b"\0\0":
            raise OSError(f"{file} does not end as the archive that torch writes")
        archive.seek(-2, os.SEEK_END)
        archive.write(struct.pack("<H", _COMMENT))
        archive.flush()
        archive.seek(0)
        digest = _digest(archive, archive.seek(0, os.SEEK_END))
        archive.write(_MARK + digest)


def _digest(archive: object, length: int) -> bytes:
    found = hashlib.sha256()
    archive.seek(0)  # type: ignore[attr-defined]
    while length > 0:
        block = archive.read(min(length, 2**24))  # type: ignore[attr-defined]
        if not block:
            break
        found.update(block)
        length -= len(block)
    return found.hexdigest().encode()


def check_sums(file: Path) -> bool:
    """Whether the file has our sum; one of an earlier version has CRCs only. Raises ValueError where a sum does not fit."""
    with file.open("rb") as archive:
        length = archive.seek(0, os.SEEK_END) - _COMMENT
        archive.seek(max(length, 0))
        comment = archive.read()
        if comment.startswith(_MARK):
            if _digest(archive, length) != comment[len(_MARK) :]:
                raise ValueError("its checksum does not fit its contents")
            return True
    with zipfile.ZipFile(file) as records:
        if bad := records.testzip():
            raise ValueError(f"the checksum of its record {bad} does not fit")
    return False


def read_step(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint, read without executing anything that it may hold.

    Raises:
        ValueError: the file is damaged or is no checkpoint of qat.
    """
    try:
        if not checkpoint.is_file():  # a device is read without end
            raise ValueError("it is no file")
        ours = check_sums(checkpoint)  # of others, the sizes of what it holds are checked by reading all of it
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=ours)
        return int(content["global_step"])
    except _DAMAGE as error:
        reason = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise ValueError(f"{checkpoint} is damaged or no checkpoint of qat: {reason}") from error


_DAMAGE = (
    OSError, RuntimeError, KeyError, TypeError, EOFError, ValueError, AttributeError, IndexError, OverflowError,
    NotImplementedError, zipfile.BadZipFile, pickle.UnpicklingError, struct.error, MemoryError, UnicodeError,
)  # fmt: skip
"""What zipfile and torch raise on bytes that are no checkpoint."""
