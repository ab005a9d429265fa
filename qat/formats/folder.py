"""What the folders and files of all formats share: written whole or not at all (`qat.storage`), replaced only if they are ours.

A folder that an earlier export wrote is replaced; anything else in the way is refused, because it is not ours to delete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qat import storage
from qat.formats.seal import SUMS, write_sums
from qat.storage import local
from qat.targets import refuse_file_name

WEIGHTS = "model.safetensors"
WRITER = {"writer": "qat"}
_KNOWN = {"README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", SUMS}


def read_metadata(file: Path) -> dict[str, str]:
    """The safetensors metadata of a file; ValueError naming it when it is missing, truncated or no safetensors file."""
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        with safe_open(file, "pt") as tensors:
            return dict(tensors.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def is_safetensors(path: Path) -> bool:
    """By its name, so that a damaged one is said to be damaged, or by its beginning: eight bytes of length, and a JSON object."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def is_ours(folder: Path) -> bool:
    """Whether an earlier export of ours wrote this folder."""
    try:
        return read_metadata(folder / WEIGHTS).get("writer") == WRITER["writer"]
    except ValueError:
        return False


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which becomes `folder` on success and vanishes on any error.

    Raises:
        ValueError: `folder` holds something that is not ours to overwrite, or the disk refuses a write.
    """
    target = local(folder).absolute()
    _refuse_foreign(target)

    def check(partial: Path) -> None:
        _readable(partial)
        _refuse_strangers(target, partial)
        write_sums(partial)

    with _refusals(target), storage.new_folder(target, check) as partial:
        yield partial


@contextmanager
def new_file(file: str | Path) -> Iterator[Path]:
    """Yield the path of a file to write, of the same name elsewhere; it becomes `file` on success and vanishes on any error.

    Raises:
        ValueError: the disk refuses a write.
    """
    target = local(file).absolute()
    with _refusals(target), storage.new_file(target) as partial:
        yield partial


@contextmanager
def _refusals(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {target}: {error}") from error


def _refuse_foreign(target: Path) -> None:
    refuse_file_name(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} exists and is not a folder; choose another target")
    if target.is_dir() and any(target.iterdir()) and not is_ours(target):
        raise ValueError(f"{target} is not empty and was not written by an export of qat; choose another target or empty it")


def _refuse_strangers(target: Path, partial: Path) -> None:
    """What an export's folder holds beside the export is not ours to delete."""
    here = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if foreign := sorted(here - {path.name for path in partial.iterdir()} - _KNOWN):
        raise ValueError(f"{target} also holds {foreign[0]!r}, which no export writes; move it away or choose another target")


def _readable(folder: Path) -> None:
    """safetensors writes with mode 0600, whatever the umask: others could not read the model."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~mask)


def refuse_depth(config: Mapping[str, Any], tensors: int) -> None:
    """Raise ValueError for a damaged number of layers, with which transformers would go on building for hours."""
    for key, value in config.items():
        if "layer" in key and isinstance(value, int | float) and value > tensors:
            raise ValueError(f"config.json has {key}={value}, but the weights are {tensors} tensors")


def refuse_report(report: Mapping[str, Any], folder: str | Path) -> None:
    """Raise ValueError for missing, unexpected or misshapen weights in transformers' loading report: it only warns of them."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            first = sorted(map(str, report[what]))[0]
            raise ValueError(f"{folder} does not fit its own config: {what.replace('_', ' ')} {first}")


def one_line(error: Exception) -> str:
    """An error's text without line breaks, at most 400 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:397] + "..."
