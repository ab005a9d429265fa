"""Rules of every process that reads an export back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import qat
from qat.formats.reader import Reader

ROOT = Path(qat.__file__).parents[1]


def reader(folder: Path, code: str, **more: object) -> Reader:
    script = folder / "script.py"
    script.write_text(f"import os, sys, time\nfile, asked, answered = sys.argv[1:]\n{code}\n")
    return Reader(script, "nobody reads {}", **more)  # type: ignore[arg-type]


def ask(one: Reader, **more: float) -> str:
    return one.ask("model", lambda file: file.write_text("what?"), Path.read_text, **more)


def test_request_and_answer(tmp_path: Path) -> None:
    one = reader(tmp_path, "open(answered, 'w').write(open(asked).read() + file)")
    assert ask(one) == f"what?{Path('model').absolute()}"


@pytest.mark.parametrize("sees", [True, False])
def test_the_way_to_qat_is_there_only_where_it_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sees: bool) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    one = reader(tmp_path, "open(answered, 'w').write(os.environ['PYTHONPATH'])", sees_qat=sees)
    assert ask(one).split(os.pathsep) == ([str(ROOT), str(tmp_path)] if sees else [str(tmp_path)])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit('it is damaged')", "nobody reads model: it is damaged"),
        ("os.abort()", "nobody reads model: ended by signal 6"),
        ("sys.exit(3)", "nobody reads model: exit code 3"),
        ("pass", "nobody reads model: exit code 0"),
    ],
)
def test_failures_are_one_line_with_the_last_words(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ask(reader(tmp_path, code))
    assert str(caught.value) == message


def test_a_reader_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nobody reads model: no answer within 0.5 seconds"):
        ask(reader(tmp_path, "time.sleep(60)"), seconds=0.5)
