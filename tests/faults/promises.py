"""What must be true after a disturbance and after going on: the promises of docs/internals/faults.md, checked."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

from faults.machine import Trial

from qat.formats.packed.folder import load
from qat.training.checkpoints import newest

LONGEST = 20.0
"""Seconds that any trial may take."""


def after_run(run: Path, trial: Trial) -> None:
    """What lies under a final name is whole: partial work never looks whole."""
    ended(trial)
    if (run / "result.json").exists():
        json.loads((run / "result.json").read_text())
    if (run / "packed").exists():
        load(run / "packed")
    newest(run / "checkpoints")
    if (run / "metrics.csv").exists() and trial.code != -signal.SIGKILL:
        read_rows(run)


def ended(trial: Trial) -> None:
    """Soon, and with words for people."""
    assert not trial.hung and trial.seconds < LONGEST * 2, f"took {trial.seconds:.0f} s"
    assert not trial.tracebacks, trial.output[-2500:]


def status(run: Path) -> str:
    """Of result.json; '' where there is none."""
    file = run / "result.json"
    return str(json.loads(file.read_text())["status"]) if file.exists() else ""


def finished(run: Path, whole: Path) -> None:
    """The run that was disturbed and went on left what the undisturbed one left: the same bytes, the same rows, nothing else."""
    assert status(run) == "done", status(run)
    assert contents(run / "packed") == contents(whole / "packed")
    assert read_rows(run) == read_rows(whole), "metrics.csv has other rows"
    assert leftovers(run) == []


def after_export(target: Path, before: Path, whole: Path, trial: Trial) -> None:
    """The old export to the byte, or the new one."""
    ended(trial)
    assert contents(target) in (contents(before), contents(whole)), f"{target} is neither the old export nor the new one"


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a folder, or the file."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def leftovers(folder: Path) -> list[str]:
    """Temporary names anywhere below."""
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


def read_rows(run: Path) -> list[dict[str, str]]:
    """Of metrics.csv, every cell a number, without what a clock says."""
    with (run / "metrics.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    said = [{key: cell for key, cell in row.items() if not key.startswith("speed/")} for row in rows]
    return [{key: cell for key, cell in row.items() if cell and float(cell) is not None} for row in said]


def signalled(run: Path, trial: Trial, number: int, begun: Path | None) -> None:
    """130, 143 or 129, and a status that says how to go on; or the run was done before the signal could matter."""
    if trial.code == 0:
        assert status(run) == "done", status(run)
        return
    assert trial.code == 128 + number, f"exit code {trial.code}, not {128 + number}: {trial.output[-800:]}"
    said, before = status(run), status(begun) if begun else ""
    assert said in (before, "done") or said.startswith("interrupted at step "), f"the status says {said!r}"
    assert said != before or "interrupted by signal" in trial.output, trial.output[-800:]


def refused(trial: Trial, verb: str) -> None:
    """2 and one line at the end, or 0 where the operation did not matter."""
    if trial.code == 0:
        return
    lines = [line for line in trial.output.splitlines() if line.startswith(verb)]
    assert trial.code == 2, f"exit code {trial.code}: {trial.output[-1500:]}"
    assert len(lines) == 1 and trial.output.rstrip().endswith(lines[0]), trial.output[-1500:]
