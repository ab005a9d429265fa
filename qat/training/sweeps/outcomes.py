"""What became of each job of a sweep: a file that launchers' processes write too, and the table that compares the jobs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from qat.reporting.result import read_result
from qat.storage import json_lines

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
        where = "not run" if self.code and not Path(self.folder).is_dir() else self.folder
        return f"job {self.number}  {self.words}  {where}{value}  {failed}{' '.join(self.status.split())}"


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
    for line in json_lines(file.read_bytes()[since:].decode(errors="replace")):
        try:
            one = Outcome(**line)
        except TypeError:
            continue
        found[one.number] = one
    return [found[number] for number in sorted(found)]


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
