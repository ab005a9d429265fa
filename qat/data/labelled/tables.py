"""Records of .tsv and .csv files, each with its place for messages.

A .tsv file is read as GLUE and many others write it: no quoting, so that a quotation mark is one of the text. A .csv file is read
by RFC 4180: a cell in quotes may hold commas, line ends and doubled quotes. The first line names the columns in both.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from qat.data.records import Record

FORMS = {
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
    ".csv": {"delimiter": ",", "strict": True},
}


def read_table(path: Path) -> Iterator[Record]:
    """Yield every row as column -> cell.

    Raises:
        ValueError: no header, a column twice, a row of another length, quotes that do not end, or bytes that are not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, **FORMS[path.suffix.lower()])  # type: ignore[arg-type]
            header = _header(next(rows, []), path)
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if row:  # an empty line is none
                    yield where, _record(header, row, where)
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: not a row of a {path.suffix} file: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} cannot be read as UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error}") from error


def _header(names: list[str], path: Path) -> list[str]:
    if not any(names):
        raise ValueError(f"data: {path} is empty; its first line must name the columns")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{path}:1: the column {twice!r} is there twice")
    return names


def _record(header: list[str], row: list[str], where: str) -> dict[str, str]:
    if len(row) != len(header):
        raise ValueError(f"{where}: the row has {len(row)} cells, the header {len(header)} ({', '.join(map(repr, header))})")
    return dict(zip(header, row, strict=True))
