"""Where text and chats come from: .txt, .jsonl and .parquet files, hub data sets, and one text that ships with Python.

Everything is read lazily, a few megabytes at a time, so that what does not fit in memory works. A text reaches the caller in
pieces `(text, ends)`: `ends` is True on a document's last piece. Only .txt files have documents of several pieces: the whole
file is one document, cut at line ends about every million characters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qat.data.records import checked_text, read_records
from qat.storage import local

PIECE = 1 << 20  # characters
BUILTIN = "pydoc_data.topics"
_FILES = (".txt", ".jsonl", ".parquet")
_NOT_READ = (".json", ".csv", ".tsv", ".md", ".gz", ".zst", ".zip", ".arrow")


@dataclass
class Source:
    """One place to read from. `subset` and `split` are for hub data sets only."""

    name: str
    """A file, the name of a hub data set, or `pydoc_data.topics`."""
    field: str = "text"
    """The field of a record that is wanted."""
    split: str = "train"
    subset: str | None = None

    @property
    def title(self) -> str:
        """How a report names it: a file without its folder."""
        return Path(self.name).name if self.is_file else self.name

    @property
    def is_file(self) -> bool:
        """A name that looks like a file and is missing is an error here, not a download."""
        path = local(self.name)
        looks_local = self.name.startswith((".", "/", "~")) or path.suffix.lower() in _FILES + _NOT_READ
        return self.name != BUILTIN and (looks_local or path.exists())

    def file(self) -> Path:
        """The path, checked. Raises ValueError where it is missing, a folder, or of a kind that is not read."""
        path = local(self.name)
        if not path.exists():
            raise ValueError(f"data: there is no file {self.name!r}")
        if path.is_dir():
            raise ValueError(f"data: {self.name!r} is a folder; give a {', '.join(_FILES)} file or the name of a hub data set")
        if not path.is_file():  # a pipe would be waited for, a device read without end
            raise ValueError(f"data: {self.name!r} is a pipe or a device; give a {', '.join(_FILES)} file")
        if path.suffix.lower() not in _FILES:
            raise ValueError(f"data: {self.name!r} is not read; allowed are {', '.join(_FILES)} files")
        return path

    def fingerprint(self) -> list[str]:
        """What the tokenized cache is keyed by: a file's content, a hub data set's coordinates (not its revision)."""
        if self.name == BUILTIN:
            return [BUILTIN, hashlib.sha256(_builtin().encode()).hexdigest()]
        if not self.is_file:
            return ["hub", self.name, str(self.subset), self.split, self.field]
        path = self.file()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [path.suffix.lower(), digest, "" if path.suffix.lower() == ".txt" else self.field]


def read_documents(source: Source) -> Iterator[tuple[str, bool]]:
    """Yield `(text, ends)`: a piece of a document, and whether the document ends with it.

    Raises ValueError for a missing or unreadable source, a missing or non-text field, and where there is no text at all.
    """
    empty = True
    for text, ends in _pieces(source):
        empty = empty and not text.strip()
        yield text, ends
    if empty:
        raise ValueError(f"data: {source.name!r} has no text")


def _pieces(source: Source) -> Iterator[tuple[str, bool]]:
    if source.name == BUILTIN:
        yield _builtin(), True
    elif source.is_file and source.file().suffix.lower() == ".txt":
        yield from _read_txt(source.file())
    else:
        for where, record in read_records(source, [source.field]):
            yield checked_text(record[source.field], f"{where}: the field {source.field!r}"), True


def _builtin() -> str:
    """English help texts of the standard library; they differ a little from one Python version to the next."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _read_txt(path: Path) -> Iterator[tuple[str, bool]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read(PIECE)
            while following := file.read(PIECE):
                cut = text.rfind("\n") + 1 or len(text)  # a line longer than a piece is cut where the piece ends
                yield text[:cut], False
                text = text[cut:] + following
            yield text, True
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{_first_bad_line(path)}: cannot be read as UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error}") from error


def _first_bad_line(path: Path) -> int:
    """The number of the first line that is not UTF-8; the decoder counts bytes within its own block."""
    with path.open("rb") as file:
        return next((number for number, line in enumerate(file, 1) if not _is_utf8(line)), 1)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
