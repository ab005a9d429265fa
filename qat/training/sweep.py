"""Jobs of a sweep: what became of each, in a file that launchers' processes write too; what is done is not run again."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qat.config import TrainConfig
from qat.reporting.page.compare import compare
from qat.reporting.result import RunResult, read_result
from qat.storage import parse_json
from qat.training.checkpoints import newest
from qat.training.recording import config_hash

FILE = "jobs.jsonl"
"""In the sweep's folder: a line each time that a job ends."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    number: int
    words: str
    """What it alone says."""
    folder: str
    status: str
    code: int = 0
    trained: float | None = None
    """What a search minimises on its own: the perplexity, or the share of wrong labels."""

    @property
    def line(self) -> str:
        """For people."""
        value = "" if self.trained is None else f"  trained {self.trained:.4f}"
        failed = "failed: " if self.code in (1, 2) else ""
        return f"job {self.number}  {self.words}  {self.folder}{value}  {failed}{self.status}"


def note(outcome: Outcome) -> None:
    """Append it to the file of its sweep, which lies in the folder above the job's: a launcher's processes share nothing else."""
    above = Path(outcome.folder).parent
    above.mkdir(parents=True, exist_ok=True)
    with (above / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def size_of(sweep: str | None) -> int:
    """Bytes of its file so far, 0 where there is none."""
    file = Path(sweep or "") / FILE
    return file.stat().st_size if file.is_file() else 0


def noted(folder: str, since: int = 0) -> list[Outcome]:
    """The last outcome of each job, in order, of the lines from byte `since` on; torn lines are none."""
    found: dict[int, Outcome] = {}
    file = Path(folder) / FILE
    if not file.is_file():
        return []
    for line in file.read_bytes()[since:].decode(errors="replace").splitlines():
        try:
            one = Outcome(**parse_json(line))
        except (ValueError, TypeError):
            continue
        found[one.number] = one
    return [found[number] for number in sorted(found)]


Show = Callable[[Callable[[TrainConfig], RunResult]], tuple[int, RunResult | None, str]]


def job_of(
    number: int, words: str, folder: str | None, show: Show, run: Callable[[TrainConfig], RunResult]
) -> tuple[Outcome, float]:
    """One job, whatever becomes of it, and what a search minimises; NaN where it has none, which Optuna knows as failed."""
    try:
        code, result, status = show(lambda config: once(config, run))
    except Exception as error:
        traceback.print_exc()
        code, result, status = 1, None, f"{type(error).__name__}: {error}"
    value = result.minimised if result and not code else None
    outcome = Outcome(number, words, folder or "not run", status, code, result.objective if result else None)
    return outcome, math.nan if value is None else value


def told(found: list[Outcome]) -> int:
    """Print the comparison and what became of each job; the worst exit code."""
    table = comparison(found)
    if table:
        print(*table, _page(found), sep="\n")
    print(*(one.line for one in found), sep="\n")
    return max((one.code for one in found), default=0)


def _page(found: list[Outcome]) -> str:
    """The page that compares the jobs which have a folder, in the sweep's; its path, or why there is none."""
    folders = [folder for one in found if (folder := Path(one.folder)) and (folder / "result.json").is_file()]
    out = folders[0].parent / "comparison.html"
    try:
        compare(folders, out)
    except (ValueError, OSError) as error:
        return f"no page compares them: {error}"
    return f"comparison {out}"


def once(config: TrainConfig, run: Callable[[TrainConfig], RunResult]) -> RunResult:
    """Run a job, from its checkpoint where an earlier sweep was interrupted; the result it has where it is done.

    A folder that holds another run is left to the error that says so.
    """
    folder = Path(config.run.dir or "")
    asked = config.run.dir and not config.dry_run and not config.resume
    result = read_result(folder) if asked else None
    if result is None or result.config_hash != config_hash(config):
        return run(config)
    if result.status == "done" or result.status.startswith("stopped"):
        print(f"{folder} is done and not run again")
        return result
    return run(replace(config, resume=str(folder)) if newest(folder / "checkpoints") else config)


def comparison(outcomes: list[Outcome]) -> list[str]:
    """Lines of a table of the jobs that were measured, the best first; none where fewer than two were."""
    rows = []
    for one in outcomes:
        result = read_result(Path(one.folder)) if one.folder else None
        if result is not None and (value := result.minimised) is not None:
            size = result.bytes.get("packed_model")
            rows.append((value, one, "" if size is None else f"{size / 1e6:.3f} MB"))
    if len(rows) < 2:
        return []
    rows.sort(key=lambda row: row[0])
    head = f"{'job':>4}  {'ln(trained/full)':>16}  {'packed':>12}  of its own"
    return [head, *(f"{one.number:>4}  {value:>16.4f}  {size:>12}  {one.words}" for value, one, size in rows)]
