"""Tests of the suite whose cases are a table of their own: run with all of them, each a trial."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from faults.cases import Case

ROOT = Path(__file__).resolve().parents[2]
SUITES: dict[str, tuple[str, list[str], dict[str, str]]] = {
    "overrides": ("wrong overrides over every key", ["tests/config/test_overrides.py"], {"QAT_ALL_OVERRIDES": "1"}),
    "requests": ("odd requests on the server", ["tests/serving", "tests/test_serve.py"], {}),
}
"""Kind -> (row, files, environment)."""


def cases(kind: str, folder: Path) -> Iterator[Case]:
    """One for each test that pytest finds."""
    row, files, more = SUITES[kind]
    results = functools.cache(partial(_results, tuple(files), tuple(more.items()), folder))
    for number, name in enumerate(_run(files, more, "--collect-only").splitlines()):
        if "::" in name:
            yield Case(row, name, partial(_outcome, results, number))


def _run(files: list[str], more: dict[str, str], *words: str) -> str:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", *words, *files]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **more}, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def _results(files: tuple[str, ...], more: tuple[tuple[str, str], ...], folder: Path) -> list[str]:
    """'' for each test that held, else the first line of why not, in the order of the files."""
    folder.mkdir(exist_ok=True)
    _run([*files], dict(more), f"--junitxml={folder / 'results.xml'}")
    text = re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd]", "?", (folder / "results.xml").read_text(errors="replace"))
    return [_message(case) for case in xml.fromstring(text).iter("testcase")]


def _message(case: xml.Element) -> str:
    bad = [part for part in case if part.tag in ("failure", "error")]
    return (bad[0].get("message") or "failed").partition("\n")[0][:500] if bad else ""


def _outcome(results: functools._lru_cache_wrapper[list[str]], number: int) -> list[str]:
    found = results()
    return [found[number]] if found[number] else []
