"""Examples of a file or hub data set: a text, or two, and a label; whatever is wrong with a record names its place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qat.config import DataConfig
from qat.data.labelled.tables import FORMS, read_table
from qat.data.records import Record, checked_text, read_records
from qat.data.sources import BUILTIN, Source
from qat.storage import local

_PLAIN = (".txt",)


@dataclass(frozen=True)
class Example:
    """`texts` are one or two; `label` as the file has it, as text; `where` it lies."""

    texts: tuple[str, ...]
    label: str
    where: str


def read_examples(source: Source, data: DataConfig) -> list[Example]:
    """All examples in their order.

    Raises:
        ValueError: a missing, empty or unreadable source; a record without one of the fields, without text, or without a label.
    """
    columns = [name for name in (data.text_field, data.pair_field, data.label_field) if name is not None]
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise ValueError(f"data: the field {twice!r} is named twice; text_field, pair_field and label_field are different ones")
    found = [_example(record, where, columns) for where, record in _records(source, columns)]
    if not found:
        raise ValueError(f"data: {source.name!r} has no examples")
    return found


def _records(source: Source, columns: list[str]) -> Iterable[Record]:
    suffix = local(source.name).suffix.lower()
    if source.name == BUILTIN or (source.is_file and suffix in _PLAIN):
        raise ValueError(f"data: {source.name!r} is plain text, which has no labels; give a .tsv, .csv, .jsonl or .parquet file")
    if suffix in FORMS and source.is_file:
        return _with_columns(read_table(_existing(source)), columns)
    return read_records(source, columns)


def _existing(source: Source) -> Any:
    """The path of a table, with the checks of every other file: it exists and is no folder, pipe or device."""
    path = local(source.name)
    if not path.exists():
        raise ValueError(f"data: there is no file {source.name!r}")
    if not path.is_file():
        raise ValueError(f"data: {source.name!r} is no file; give a .tsv, .csv, .jsonl or .parquet file")
    return path


def _with_columns(records: Iterable[Record], columns: list[str]) -> Iterable[Record]:
    for where, record in records:
        for column in columns:
            if column not in record:
                raise ValueError(f"{where}: there is no column {column!r}; its columns are {', '.join(map(repr, record))}")
        yield where, record


def _example(record: dict[str, Any], where: str, columns: list[str]) -> Example:
    *texts, label = columns
    found = tuple(checked_text(record[name], f"{where}: the field {name!r}").strip() for name in texts)
    if empty := next((name for name, text in zip(texts, found, strict=True) if not text), None):
        raise ValueError(f"{where}: the field {empty!r} has no text")
    return Example(found, _label(record[label], where, label), where)


def _label(value: Any, where: str, field: str) -> str:
    """As text; 1 and "1" are one label, true is the label `True`."""
    if isinstance(value, str) and value.strip():
        return checked_text(value.strip(), f"{where}: the field {field!r}")
    if isinstance(value, int):
        return str(value)
    what = (
        "is missing" if value is None or value == "" or isinstance(value, str) else f"is {type(value).__name__} ({value!r:.40})"
    )
    raise ValueError(f"{where}: the label in {field!r} {what}; a label is a word or a whole number")
