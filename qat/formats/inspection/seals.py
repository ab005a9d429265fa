"""Whether a model's files are as they were written, and the way to say that an edit was on purpose."""

from __future__ import annotations

from pathlib import Path

from qat.formats.contents import read
from qat.formats.folder import WEIGHTS
from qat.formats.seal import Seal, folder_seal, write_sums
from qat.storage import local


def seal_of(path: Path) -> Seal:
    """What the checksums of a run, a folder or a file say; ValueError where they are damaged themselves."""
    place = _place(path)
    if place.is_dir():
        return folder_seal(place)
    if place.suffix == ".gguf":
        from qat.formats.gguf import container, seal

        return seal.seal(container.read(place))
    if place.suffix == ".pt2":
        from qat.formats.pt2 import seal as of_pt2

        return of_pt2.seal(place)
    return Seal(False)


def reseal(path: Path) -> None:
    """Write the checksums of a folder or GGUF file anew, after an edit on purpose.

    Raises:
        ValueError: what it holds is damaged all the same, or it is of a kind that has no seal, or is not to be edited.
    """
    read(path)
    place = _place(path)
    if place.suffix == ".gguf":
        from qat.formats.gguf import seal

        seal.write_sum(place)
    elif place.is_dir():
        write_sums(place)
    else:
        raise ValueError(f"{path}: --reseal is for the folders and .gguf files that qat writes, which people edit")


def _place(path: Path) -> Path:
    """The folder or file that is sealed as a whole."""
    path = local(path)
    if (path / "result.json").is_file() and (path / "packed").is_dir():
        return path / "packed"
    return path.parent if path.name == WEIGHTS and (path.parent / "config.json").is_file() else path
