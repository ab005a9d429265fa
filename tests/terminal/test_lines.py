"""Lines are broken between words in a terminal alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qat.terminal.lines import say, wrapped

ROOT = Path(__file__).resolve().parents[2]
LINE = "warning: 12 updates; below 1,000 the gap is limited by updates: data.batch_size=1 trainer.max_steps=1200 makes more"


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say(LINE, "short")
    assert capsys.readouterr().out == f"{LINE}\nshort\n"


def test_a_terminal_gets_lines_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "50")
    lines = wrapped(LINE, indent=4).splitlines()
    assert all(len(line) <= 50 for line in lines) and [line[:4] == "    " for line in lines] == [
        False,
        *[True] * (len(lines) - 1),
    ]
    assert " ".join(line.strip() for line in lines) == LINE
    path = "/a/folder" * 12
    assert wrapped(f"see {path}").split() == ["see", path]  # a path can still be copied


def test_it_is_so_while_a_bar_stands(tmp_path: Path) -> None:
    """rich puts an object of its own in place of stdout then."""
    pty = pytest.importorskip("pty")
    script = f"from qat.terminal.lines import say\nfrom qat.terminal.stage import stage\nwith stage('x', 3):\n    say({LINE!r})"
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "60", "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", script], stdout=slave, stderr=slave, env=environment, check=True, timeout=300)
    os.close(slave)
    text = os.read(master, 100_000).decode()
    os.close(master)
    assert LINE not in text and "warning: 12 updates; below 1,000 the gap is limited by" in text
