"""Runs of the study, one process each, resumable: what is done is kept, what was cut off goes on from its checkpoint."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks.quality.rows import Run, Study
from qat.reporting.result import RunResult, read_result

_stopping = threading.Event()
_running: set[subprocess.Popen[bytes]] = set()


def done(folder: Path) -> RunResult | None:
    """The result of a run that came to its end."""
    result = read_result(folder)
    return result if result is not None and result.status == "done" else None


def log_perplexity(result: RunResult) -> float:
    """ln of the packed model's perplexity, by which swept values are compared."""
    return math.log(result.perplexity["packed"])


def best(out: Path, runs: Sequence[Run]) -> Mapping[str, float] | None:
    """The swept values of the run with the lowest perplexity; None where none is done."""
    found = [(log_perplexity(result), run.choice) for run in runs if (result := done(out / run.name)) is not None]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def chosen(study: Study, out: Path, runs: Sequence[Run]) -> list[Run]:
    """Of a row's runs at a budget those to make: all swept values where it sweeps, else what seed 0 found best before."""
    row, budget = runs[0].row, study.budgets[runs[0].budget]
    if not row.sweep or "after" not in budget:
        return list(runs)
    choice = best(out, [replace(run, budget=budget["after"], seed=0) for run in runs])
    if choice is None:
        print(f"{row.name}: no run at {budget['after']} is done, so none is made at {runs[0].budget}", file=sys.stderr)
    return [run for run in runs if run.choice == choice]


def execute(run: Run, out: Path, places: Mapping[str, str], commit: str) -> str:
    """Train one run to its end; what came of it, in words, or "" where another command has done it or is at it."""
    folder = out / run.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ""
        return "" if _stopping.is_set() or done(folder) is not None else _train(run, folder, places, commit)


def _train(run: Run, folder: Path, places: Mapping[str, str], commit: str) -> str:
    last = folder / "checkpoints" / "last.ckpt"
    if folder.exists() and not last.exists():
        shutil.rmtree(folder)  # the study's own folder, of a run that was cut off before its first checkpoint
    arguments = [f"resume={folder}"] if last.exists() else [*run.arguments(places), f"run.dir={folder}"]
    log = folder.with_name(folder.name + ".log")
    with log.open("a") as file:
        print("$ python -m qat.train", *arguments, f"   # {commit}", file=file, flush=True)
        environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ}
        command = [sys.executable, "-m", "qat.train", *arguments]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        _running.add(process)
        code = process.wait()
        _running.discard(process)
    result = done(folder)
    if result is None:
        return f"stopped: {log}" if _stopping.is_set() else f"FAILED with {code}: see {log}"
    (folder / "commit").write_text(commit + "\n")
    return f"{result.perplexity['packed']:.3f}, {result.tokens_per_second or 0:,.0f} tokens/s"


def execute_all(runs: Sequence[Run], out: Path, places: Mapping[str, str], jobs: int) -> int:
    """All runs, `jobs` at once; how many failed. SIGINT and SIGTERM are passed on to runs, which save and stop; none is begun."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)

    def one(run: Run) -> bool:
        words = execute(run, out, places, commit)
        if words:
            print(f"{run.name}: {words}", flush=True)
        return words.startswith("FAILED")

    with ThreadPoolExecutor(jobs) as pool:
        failed = sum(pool.map(one, runs))
    if _stopping.is_set():
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130)
    return failed


def _stop(number: int, _: object) -> None:
    """Begin no other run, and let those that go on save and stop."""
    _stopping.set()
    for process in tuple(_running):
        process.send_signal(number)
