"""Records of .jsonl and .parquet files and of hub data sets, as they lie there, each with its place for messages.

Whatever is wrong with a line is one ValueError that names file and line: what the parsers raise by themselves is of many classes
(RecursionError for deep nesting, UnicodeDecodeError, pyarrow's own) and mostly without the place.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.data.sources import Source

Record = tuple[str, dict[str, Any]]
"""Where it lies (`FILE:LINE`), and its fields."""


def read_records(source: Source, columns: list[str] | None = None) -> Iterator[Record]:
    """Yield every record; of a parquet file only `columns` are read.

    Raises ValueError for a missing or damaged source, and for a record that is no object or lacks one of `columns`.
    """
    if not source.is_file:
        return _with_columns(_read_hub(source), columns)
    path = source.file()
    if path.suffix.lower() == ".txt":
        raise ValueError(f"data: {path} is plain text, which has no records; give a .jsonl or .parquet file or a hub data set")
    return _with_columns(_read_jsonl(path), columns) if path.suffix.lower() == ".jsonl" else _read_parquet(path, columns)


def _with_columns(records: Iterator[Record], columns: list[str] | None) -> Iterator[Record]:
    for where, record in records:
        _check(record, columns, where)
        yield where, record


def _check(record: Any, columns: list[str] | None, where: str) -> None:
    for column in columns or []:
        if column not in record:
            raise ValueError(f"{where}: there is no field {column!r}; its fields are {', '.join(map(repr, record)) or 'none'}")


def _read_jsonl(path: Path) -> Iterator[Record]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error}") from error


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise ValueError(f"{where}: not a line of JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not a line of JSON that can be read: it is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record must be an object with fields, not {type(record).__name__}")
    return record


def _read_parquet(path: Path, columns: list[str] | None) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet as parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check(dict.fromkeys(file.schema_arrow.names), columns, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}:row {row}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        after = f" after row {row}" if row else ""
        raise ValueError(f"data: cannot read {path} as parquet{after}: {one_line(error)}") from error


def _read_hub(source: Source) -> Iterator[Record]:
    import datasets

    from qat.models.hub import hub_found

    if not hub_found():  # datasets would retry for half a minute
        raise ValueError(
            f"data: there is no file {source.name!r}, and the Hugging Face hub cannot be reached for a data set of that name"
        )
    datasets.utils.logging.set_verbosity_error()
    try:
        stream = datasets.load_dataset(source.name, source.subset, split=source.split, streaming=True)
        for number, record in enumerate(stream, 1):
            yield f"{source.name} ({source.split}) record {number}", record
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        message = f"data: cannot read {source.name!r}; there is no such file, and as a hub data set it fails: {one_line(error)}"
        raise ValueError(message) from error


def checked_text(value: Any, where: str) -> str:
    """The text itself. Raises ValueError for what is no text, and for half a surrogate pair, which no tokenizer takes."""
    if not isinstance(value, str):
        raise ValueError(f"{where} holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x} at character {error.start + 1}"
        raise ValueError(f"{where} holds half of a surrogate pair, {half}: an emoji was cut in two; mend or remove it") from error
    return value


def one_line(error: BaseException, most: int = 300) -> str:
    """An error's text without line ends, cut to `most` characters; its class where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__
