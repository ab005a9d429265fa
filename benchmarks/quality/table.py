"""Tables of the study: each row's perplexity and its gap to the untouched full-precision model, seeds put together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.rows import Row, Run, Study
from benchmarks.quality.runs import done
from qat.reporting.result import RunResult


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
    """A line for each row that has a result, of the swept values with the lowest median; best first."""
    found: dict[str, list[Line]] = {}
    for plan in study.plan:
        if (plan["model"], plan["budget"]) != (model, budget):
            continue
        for runs in study.runs(plan):
            for choice in {run.name.partition("/seed")[2].partition("-")[2]: run.choice for run in runs}.values():
                same = [run for run in runs if run.choice == choice]
                results = [(run, result) for run in same if (result := done(out / run.name)) is not None]
                if results:
                    line = Line(runs[0].row, [run for run, _ in results], [result for _, result in results])
                    found.setdefault(runs[0].row.name, []).append(line)
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


def points(study: Study, out: Path) -> list[tuple[str, str, int, float]]:
    """(row, of, bytes of the linear layers, perplexity) of the largest budget of the first model, for the picture."""
    model = study.plan[0]["model"]
    return [(line.row.name, line.row.of, line.size, line.median) for line in lines(study, out, model, "full")]
