"""Reading documents from files, hub data sets and the text that ships with Python."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qat.data.sources import Source, read_documents


def texts(path: Path, **arguments: str) -> list[tuple[str, bool]]:
    return list(read_documents(Source(str(path), **arguments)))


def test_a_text_file_is_one_document_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.data.sources.PIECE", 10)
    file = tmp_path / "a.txt"
    file.write_text("one two\nthree four five\nsix\n" * 3, newline="")
    pieces = texts(file)
    assert "".join(text for text, _ in pieces) == file.read_text()
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 3


def test_jsonl_and_parquet_give_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    words = ["first", "second\nline", "third ü"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": 1, "body": w}) for w in words) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "body": words}), tmp_path / "a.parquet", row_group_size=2)
    expected = [(word, True) for word in words]
    assert texts(tmp_path / "a.jsonl", field="body") == texts(tmp_path / "a.parquet", field="body") == expected


def test_the_text_that_ships_with_python() -> None:
    [(text, ends)] = texts(Path("pydoc_data.topics"))
    assert ends and len(text) > 300_000 and 'The "assert" statement' in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n \n", "has no text"),
        ("a.txt", b"x\r\ncaf\xe9", "a.txt:2: cannot be read as UTF-8 text"),
        ("a.csv", b"x", "allowed are .txt, .jsonl, .parquet"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": oops}\n', r"a.jsonl:2: not a line of JSON"),
        ("a.jsonl", b'{"body": "x", "id": 3}\n', r"a.jsonl:1: there is no field 'text'; its fields are 'body', 'id'"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1: the field 'text' holds int"),
        ("a.jsonl", b"[1]\n", "must be an object"),
        ("a.jsonl", b"", "has no text"),
        (
            "a.jsonl",
            b'{"text": "ok"}\n{"text": "half \\ud83d"}\n',
            r"a.jsonl:2: the field 'text' holds half of .*d83d at character 6",
        ),
        ("a.jsonl", b'{"text": "ok"}\r\n\xff\n', "a.jsonl:2: not a line of JSON: .*utf-8"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "a.jsonl:1: .*nested too deeply"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"7" * 5000 + b"}\n", "a.jsonl:1: not a line of JSON"),
        ("a.jsonl", b'{"text": NaN}\n', "a.jsonl:1: the field 'text' holds float, not text"),
        ("a.jsonl", b'{"text": null}\n', "a.jsonl:1: the field 'text' holds NoneType, not text"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "a.jsonl:1: not a line of JSON"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "allowed are .txt, .jsonl, .parquet"),
        ("a.parquet", b"", "as parquet"),
        ("a.parquet", b"PAR1 not really", "as parquet"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / name)


def test_damaged_parquet_is_one_line_with_its_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file, broken = tmp_path / "a.parquet", 0
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"document {i}" for i in range(50)]}), file)
    raw = file.read_bytes()
    for place in range(0, len(raw), 7):
        file.write_bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
        try:
            texts(file)
        except ValueError as error:
            broken += 1
            assert "a.parquet" in str(error) and "\n" not in str(error)
    assert broken > 20


def test_marks_of_byte_order_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two", "n": NaN}\r\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts(tmp_path / "a.jsonl") == [("one", True), ("two", True)]
    assert texts(tmp_path / "a.txt") == [("one\r\ntwo", True)]


def test_an_unreachable_hub_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.models.hub.hub_found", lambda: False)
    with pytest.raises(ValueError, match="no file 'org/name', and the Hugging Face hub cannot be reached"):
        texts(Path("org/name"))


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        texts(Path("nowhere.txt"))
    with pytest.raises(ValueError, match="is a folder"):
        texts(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="is a pipe or a device"):
        next(read_documents(Source(str(tmp_path / "x.txt"))))
