"""Tables of the study: each row's perplexity and its gap to the untouched full-precision model, seeds put together."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.rows import Row, Run, Study
from benchmarks.quality.runs import done
from qat.reporting.result import RunResult

UNTRAINED = "untrained.json"
"""What `benchmarks.quality.untrained` writes beside the runs."""


@dataclass(frozen=True)
class Line:
    """What the runs of one row at one budget came to, all with the same swept values."""

    row: Row
    runs: list[Run]
    results: list[RunResult]

    @property
    def perplexities(self) -> list[float]:
        """Of the packed models, a seed each."""
        return [result.perplexity["packed"] for result in self.results]

    @property
    def median(self) -> float:
        """Over the seeds."""
        return statistics.median(self.perplexities)

    @property
    def gap(self) -> float:
        """ln(median / full precision)."""
        return math.log(self.median / self.results[0].perplexity["full_precision"])

    @property
    def size(self) -> int:
        """Bytes of the linear layers, packed."""
        return self.results[0].bytes["packed_linears"]


def lines(study: Study, out: Path, model: str, budget: str) -> list[Line]:
    """A line for each row that has a result, of the swept values with the lowest median over all plans' seeds; best first."""
    plans = [plan for plan in study.plan if (plan["model"], plan["budget"]) == (model, budget)]
    runs = {run.name: run for plan in plans for every in study.runs(plan) for run in every}
    same: dict[tuple[Any, ...], list[tuple[Run, RunResult]]] = {}
    for run in sorted(runs.values(), key=lambda run: run.seed):
        if (result := done(out / run.name)) is not None:
            same.setdefault((run.row.name, *run.choice.items()), []).append((run, result))
    found: dict[str, list[Line]] = {}
    for (name, *_), pairs in same.items():
        found.setdefault(name, []).append(Line(pairs[0][0].row, [run for run, _ in pairs], [result for _, result in pairs]))
    return sorted((min(every, key=lambda line: line.median) for every in found.values()), key=lambda line: line.median)


def tables(study: Study, out: Path) -> Iterator[str]:
    """Markdown, a table for each model and budget that has results."""
    for model, budget in dict.fromkeys((plan["model"], plan["budget"]) for plan in study.plan):
        if not (found := lines(study, out, model, budget)):
            continue
        full = found[0].results[0].perplexity["full_precision"]
        yield f"\n**{model}, {study.budgets[budget]['tokens']:,} tokens; full precision {full:.3f}**\n"
        yield "| row | of | setting | chosen of the sweep | seeds | perplexity | gap | linear layers |"
        yield "|---|---|---|---|---:|---:|---:|---:|"
        yield from map(_cells, found)


def _cells(line: Line) -> str:
    choice = ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in line.runs[0].choice.items()) or "-"
    every = f" ({', '.join(f'{value:.3f}' for value in line.perplexities)})" if len(line.results) > 1 else ""
    cells = [
        line.row.name,
        line.row.of,
        line.row.says,
        choice,
        str(len(line.results)),
        f"{line.median:.3f}{every}",
        f"{line.gap:.3f}",
    ]
    return "| " + " | ".join([*cells, f"{line.size:,} bytes"]) + " |"


def full_precision(study: Study, out: Path) -> float | None:
    """The first model's, untouched; None before a run of the larger budget is done."""
    found = lines(study, out, study.plan[0]["model"], "full")
    return found[0].results[0].perplexity["full_precision"] if found else None


def points(study: Study, out: Path) -> list[tuple[str, str, int, float]]:
    """(row, of, bytes of the linear layers, perplexity) of the first model's larger budget, and what `untrained` wrote."""
    model = study.plan[0]["model"]
    trained = [(line.row.name, line.row.of, line.size, line.median) for line in lines(study, out, model, "full")]
    file = out / UNTRAINED
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return trained + [(one["row"], one["of"], one["bytes"], one["perplexity"]) for one in found]
