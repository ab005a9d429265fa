"""Several runs beside each other: a table for the terminal and a page, with bytes against gap and parallel coordinates."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Column
from rich.table import Table as TerminalTable

from qat.reporting.page import reproduce
from qat.reporting.page.charts import line
from qat.reporting.page.parts import SERIES, Block, Cell, Figure, Section, Table, megabytes, name_cell
from qat.reporting.page.reading import Run, read_run
from qat.reporting.page.render import page
from qat.reporting.page.verdict import Number, Verdict, gap, size_factor, tone_of
from qat.reporting.result import Perplexity
from qat.storage import write_text

MOST_KEYS = 8
"""Columns of keys that differ; more do not fit a screen."""
WHAT = "ln(trained / full precision)"


def compare(folders: Sequence[Path], out: Path) -> TerminalTable:
    """Write the page that compares these runs to `out`; the same as a table for the terminal.

    Raises:
        ValueError: a folder holds no run, or fewer than two are given.
    """
    if len(folders) < 2:
        raise ValueError(f"a comparison needs two runs; given: {', '.join(map(str, folders)) or 'none'}")
    runs = [read_run(folder) for folder in folders]
    write_text(out, comparison(runs))
    return terminal_table(runs)


def expanded(folders: Sequence[Path]) -> list[Path]:
    """The folders; one that is no run but holds some, as that of a sweep, gives those in place of itself."""
    found: list[Path] = []
    for folder in folders:
        one_run = (folder / "config.yaml").exists()
        found += [folder] if one_run else sorted(_inside(folder), key=_natural) or [folder]
    return found


def _inside(folder: Path) -> Iterator[Path]:
    """The runs in a folder, however deep; not what lies within a run, as a tracker's own config.yaml."""
    for here, below, files in os.walk(folder):
        if "config.yaml" in files:
            yield Path(here)
        below[:] = [] if "config.yaml" in files else [name for name in below if not name.startswith(".")]


def _natural(folder: Path) -> list[tuple[int, str]]:
    """9 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in folder.parts]


def labels(runs: Sequence[Run]) -> list[str]:
    """Names that tell the runs apart: the parts of their paths that are not the same in all."""
    parts = [run.folder.absolute().parts for run in runs]
    shared = 0
    while all(len(one) > shared + 1 and one[shared] == parts[0][shared] for one in parts):
        shared += 1
    return ["/".join(one[shared:]) for one in parts]


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Key -> its value in each run, of the keys that are not the same in all."""
    flats = [reproduce.flat(run.config) for run in runs]
    names = dict.fromkeys(key for one in flats for key in one if key.partition(".")[0] not in reproduce.ELSEWHERE)
    found = {key: [one.get(key) for one in flats] for key in names}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _outcomes(run: Run) -> list[str]:
    trained, lost, factor = run.result.measured.get("trained"), gap(run), size_factor(run)
    packed = run.result.bytes.get("packed_model")
    return [
        _word(run.result.status),
        "" if trained is None else run.result.measured.shown(trained),
        "" if lost is None else f"{lost:+.3f}",
        "" if packed is None else megabytes(packed),
        "" if factor is None else f"{factor:.1f}×",
        short(run.result.tokens) if run.result.tokens else "",
    ]


def _word(status: str) -> str:
    """done, failed, interrupted, ...; what follows does not fit a table."""
    return re.split(r"[:;,]| at | by ", status)[0]


def short(count: float) -> str:
    """1.6M, 410k."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


HEAD = ("status", "trained", "gap", "packed", "smaller", "tokens")


def _order(runs: Sequence[Run]) -> list[int]:
    """The best first; those without a gap at the end, as they were given."""
    return sorted(range(len(runs)), key=lambda i: math.inf if (lost := gap(runs[i])) is None or math.isnan(lost) else lost)


def _measured_on(runs: Sequence[Run]) -> str:
    """What is to be said where runs were not measured on one and the same text; "" where they were."""
    found = [run.result.measured for run in runs if gap(run) is not None]
    places = dict.fromkeys(
        f"{one.text}, {one.tokens:,} tokens at context {one.context}" for one in found if isinstance(one, Perplexity)
    )
    return "" if len(places) < 2 else f"Not measured alike, so that gaps are no order: {'; '.join(places)}."


def terminal_table(runs: Sequence[Run]) -> TerminalTable:
    """What a person reads: the best run first."""
    table = TerminalTable(
        Column("run", overflow="fold", min_width=12), box=SIMPLE, caption=f"gap: {WHAT}. {_measured_on(runs)}".rstrip(". ")
    )
    for name in HEAD:
        table.add_column(name, justify="left" if name == "status" else "right", no_wrap=True)
    names = labels(runs)
    for i in _order(runs):
        table.add_row(names[i], *_outcomes(runs[i]))
    return table


def comparison(runs: Sequence[Run]) -> str:
    """The page."""
    names, keys = labels(runs), differing(runs)
    sections = [
        Section("runs", "Runs", [_table(runs, names, keys)]),
        Section("pareto", "Bytes against gap", [pareto] if (pareto := _pareto(runs, names)) else [], "No run has both yet."),
        Section("parallel", "Parallel coordinates", _parallel(runs, keys), about="A line is a run; drag along an axis to pick."),
        Section("curves", "Loss", [_curves(runs, names)]),
    ]
    shown = [section for section in sections if section.blocks or section.absent]
    best = next((i for i in _order(runs) if gap(runs[i]) is not None), None)
    return page(
        f"{len(runs)} runs",
        _facts(runs),
        _said(runs, names, best),
        _numbers(runs, best),
        shown,
    )


def _facts(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(str(run.get("model.path")) for run in runs))[:3]


def _said(runs: Sequence[Run], names: Sequence[str], best: int | None) -> Verdict:
    without = sum(gap(run) is None for run in runs)
    more = f" {without} of {len(runs)} runs have no result to compare." if without else ""
    more += f" {other}" if (other := _measured_on(runs)) else ""
    if best is None:
        return Verdict("No run has a result to compare yet.", "quiet")
    return Verdict(
        f"Run {names[best]} comes closest to full precision, {WHAT} = {gap(runs[best]):.3f}.{more}",
        "warn" if (without or other) and tone_of(runs[best]) == "good" else tone_of(runs[best]),
    )


def _numbers(runs: Sequence[Run], best: int | None) -> list[Number]:
    done = sum(run.done for run in runs)
    found = [Number(f"{done} of {len(runs)}", "runs are done")]
    return found if best is None else [Number(f"{gap(runs[best]):+.3f}", "the smallest gap", tone_of(runs[best])), *found]


def _table(runs: Sequence[Run], names: Sequence[str], keys: dict[str, list[Any]]) -> Table:
    chosen = list(keys)[:MOST_KEYS]
    rows = []
    for i in _order(runs):
        status, *outcomes = _outcomes(runs[i])
        cells = [Cell(text) for text in outcomes] + [Cell(reproduce.setting(keys[key][i])[:60]) for key in chosen]
        rows.append([name_cell(names[i], status), *cells])
    caption = (
        "" if len(keys) <= MOST_KEYS else f"{len(keys) - MOST_KEYS} further keys differ: {', '.join(list(keys)[MOST_KEYS:40])}."
    )
    return Table(["run", *HEAD[1:], *chosen], rows, caption)


def _pareto(runs: Sequence[Run], names: Sequence[str]) -> Figure | None:
    """Each run as a point, and the line through those that no other beats in both."""
    points = [
        (size, lost, name)
        for run, name in zip(runs, names, strict=True)
        if (size := run.result.bytes.get("packed_model")) and (lost := gap(run)) is not None and math.isfinite(lost)
    ]
    if not points:
        return None
    front, least = [], math.inf
    for size, lost, name in sorted(points):
        if lost < least:
            front.append((size, lost, name))
            least = lost
    shown = {
        "type": "scatter",
        "mode": "markers",
        "name": "runs",
        "marker": {"size": 9, "color": "--blue"},
        "hovertemplate": "%{text}<br>%{x:,} bytes, gap %{y:.3f}<extra></extra>",
    }
    edge = {
        "type": "scatter",
        "mode": "lines",
        "name": "no other is better in both",
        "line": {"color": "--orange", "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
    }
    layout = {
        "xaxis": {"title": {"text": "bytes of the packed model"}, "tickformat": "~s"},
        "yaxis": {"title": {"text": WHAT}},
        "hovermode": "closest",
    }
    return Figure(
        "Pareto", [_xy(edge, front), {**_xy(shown, points), "text": [name for _, _, name in points]}], layout, height=380
    )


def _xy(trace: dict[str, Any], points: Sequence[tuple[float, float, str]]) -> dict[str, Any]:
    return {**trace, "x": [size for size, _, _ in points], "y": [lost for _, lost, _ in points]}


def _parallel(runs: Sequence[Run], keys: dict[str, list[Any]]) -> list[Block]:
    """Keys that differ as axes, then what came of them; runs without a gap are left out."""
    whole = [i for i, run in enumerate(runs) if (lost := gap(run)) is not None and math.isfinite(lost)]
    if len(whole) < 2:
        return []
    gaps = [gap(runs[i]) for i in whole]
    axes = [_axis(key, [values[i] for i in whole]) for key, values in list(keys.items())[:MOST_KEYS]]
    sizes = [runs[i].result.bytes.get("packed_model") for i in whole]
    if all(sizes):
        axes.append({"label": "bytes", "values": sizes, "tickformat": "~s"})
    axes.append({"label": "gap", "values": gaps})
    colours = {"color": gaps, "colorscale": [[0, "--green"], [0.5, "--blue"], [1, "--orange"]]}
    layout = {"margin": {"l": 60, "r": 40, "t": 50, "b": 20}}
    return [
        Figure("", [{"type": "parcoords", "line": colours, "dimensions": axes, "labelfont": {"size": 11}}], layout, height=380)
    ]


def _axis(key: str, values: Sequence[Any]) -> dict[str, Any]:
    """Numbers as they are; anything else by its place among its values."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return {"label": key, "values": list(values)}
    words = list(dict.fromkeys(reproduce.setting(value)[:24] for value in values))
    places = [words.index(reproduce.setting(value)[:24]) for value in values]
    return {"label": key, "values": places, "tickvals": list(range(len(words))), "ticktext": words}


def _curves(runs: Sequence[Run], names: Sequence[str]) -> Figure:
    data = [
        line(names[i], runs[i].metrics["train/loss"], SERIES[n % len(SERIES)])
        for n, i in enumerate(_order(runs)[:24])
        if "train/loss" in runs[i].metrics
    ]
    layout = {"xaxis": {"title": {"text": "step"}}, "hovermode": "closest", "showlegend": len(data) <= len(SERIES)}
    caption = "" if len(runs) <= 24 else "The 24 runs with the smallest gap."
    return Figure("Training loss", data, layout, caption, height=380)
