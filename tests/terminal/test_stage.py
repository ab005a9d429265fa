"""What is shown while something long is done: a bar in a terminal, sparing lines elsewhere, never a word on stdout."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qat.terminal import stage as module
from qat.terminal.stage import Stage, clock, quietly, stage

ROOT = Path(__file__).resolve().parents[2]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
SCRIPT = """
import time
from qat.terminal.stage import stage
with stage("perplexity of a model whose name is much longer than any line of a terminal could ever be", 40, "windows") as outer:
    outer.advance(10)
    with stage("reading the file"):
        print("a result", flush=True)
        time.sleep(0.3)
"""


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST", 0.02)
    monkeypatch.setattr(module, "EVERY", 0.05)


def test_what_is_over_at_once_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("tokenizing a.txt", 3) as one:
        assert list(one.each("abc")) == ["a", "b", "c"] and one.done == 3
    assert capsys.readouterr() == ("", "")


def test_what_lasts_says_that_it_began_how_far_it_is_and_how_long_it_took(capsys: pytest.CaptureFixture[str], fast: None) -> None:
    with stage("tokenizing a.txt", 4, "windows") as one:
        one.advance()
        time.sleep(0.1)
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == "" and lines[0] == "qat: tokenizing a.txt ..." and lines[-1] == "qat: tokenizing a.txt: 0:00"
    assert lines[1:-1] and set(lines[1:-1]) == {"qat: tokenizing a.txt: 1 of 4 windows, 0:00 left"}


def test_what_fails_does_not_say_that_it_is_done(capsys: pytest.CaptureFixture[str], fast: None) -> None:
    with pytest.raises(ValueError), stage("loading"):
        time.sleep(0.04)
        raise ValueError
    assert capsys.readouterr().err.splitlines() == ["qat: loading ..."]


def test_quiet_is_quiet_and_stays_so_within(capsys: pytest.CaptureFixture[str], fast: None) -> None:
    with quietly(), quietly(False), stage("loading") as one:
        time.sleep(0.05)
        one.advance()
    assert capsys.readouterr() == ("", "") and one.done == 1


def test_progress_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 30.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    one = Stage("x", 40, "windows")
    assert one.progress() == ""
    one.advance(10)
    assert one.progress() == "10 of 40 windows, 1:30 left"
    free = Stage.__new__(Stage)
    free.done, free.total, free.unit, free.remark = 1234567, None, "tokens", "loss 2"
    assert free.progress() == "1,234,567 tokens, loss 2"


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 7.4, 760, 11100)] == ["0:00", "0:07", "12:40", "3:05:00"]


def in_terminal(**environment: str) -> tuple[str, str]:
    """(what a terminal of 80 columns was sent on stderr, what a pipe got of stdout)."""
    master, slave = pty.openpty()
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", **environment}
    variables.pop("NO_COLOR", None) if "NO_COLOR" not in environment else None
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=slave, env=variables)
    os.close(slave)
    sent = b""
    while True:
        try:
            block = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        sent += block
    os.close(master)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, sent.decode()
    return sent.decode(), out.decode()


def test_a_bar_in_a_terminal_fits_its_columns_and_leaves_stdout_alone() -> None:
    sent, out = in_terminal()
    assert out == "a result\n" and COLOURS.search(sent)
    drawn = [line for line in re.split(r"[\r\n]+", ESCAPES.sub("", sent)) if line.strip()]
    assert any("reading the file" in line for line in drawn) and any("10 of 40 windows" in line for line in drawn)
    assert max(map(len, drawn)) <= 80, drawn


def test_no_color_has_none() -> None:
    sent, _ = in_terminal(NO_COLOR="1")
    assert "reading the file" in sent and not re.search(r"\x1b\[(3|9)\d", sent)


def test_a_dumb_terminal_gets_lines() -> None:
    assert "\x1b" not in in_terminal(TERM="dumb")[0]
