"""The table that a person reads at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qat.reporting.following import following
from qat.reporting.result import RunResult
from qat.terminal.lines import wrapped

REPORT = "report.html"
"""In a run's folder."""

STAGES = {
    "full_precision": "full precision",
    "control": "control, fine-tuned",
    "converted": "converted, not trained",
    "trained": "after QAT",
    "packed": "packed",
    "exported": "read back from the export",
}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


_COLUMN = 11
"""Where what stands behind a label begins."""


def print_table(result: RunResult) -> None:
    """The table that a person reads at the end of a run."""
    console = Console(highlight=False)
    console.print(f"{result.recipe}: {result.measured.words}")
    console.print(_stages_table(result))
    for line in _lines(result):
        console.print(wrapped(line, indent=_COLUMN), soft_wrap=True, markup=False)
    for line in _places(result):
        console.print(line, soft_wrap=True, markup=False)


def _stages_table(result: RunResult) -> Any:
    about = result.measured
    table = Table()
    table.add_column("model", no_wrap=True)
    texts = {one.title: one for one in (about, *result.further.values())}
    gaps = {key: about.gap(value) for key, value in about.items()}
    for number, name in enumerate(texts):
        table.add_column(name, justify="right")
        if number == 0 and any(gaps.values()):
            table.add_column(about.gap_title, justify="right")
    for key, label in STAGES.items():
        if key in about:
            first, *others = (values.shown(values[key]) if key in values else "" for values in texts.values())
            table.add_row(label, first, *([gaps[key]] if any(gaps.values()) else []), *others)
    return table


def _lines(result: RunResult) -> list[str]:
    lines = result.measured.lines()
    if "metric" in result.packed_from:
        lines.append(f"weights    {result.weights}")
    if "packed_model" in result.bytes:
        lines.append(_size_line(result.bytes))
    if result.tokens:
        assert result.seconds is not None and result.tokens_per_second is not None
        lines.append(f"training   {result.tokens:,} tokens in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s")
    if "summary" in result.conversion:
        lines.append(f"layers     {result.conversion['summary']}")
    lines += [f"verified   {text}" for text in result.verification.get("summary", [])]
    lines += [f"exported   {name}" for name in result.export.get("done", [])]
    lines += [f"skipped    export {name}: {reason}" for name, reason in result.export.get("skipped", {}).items()]
    lines += [f"pushed     {result.hub['url']}"] if "url" in result.hub else []
    return lines


def _places(result: RunResult) -> list[str]:
    """What is copied: paths and commands."""
    lines = []
    if (Path(result.folder) / REPORT).is_file():
        lines.append(f"report     {Path(result.folder) / REPORT}")
    if commands := following(result):
        lines += ["next", *(f"  {command}" for command in commands)]
    return [*lines, f"run        {result.folder} ({result.status})"]


def _size_line(size: dict[str, int]) -> str:
    whole, packed = size["full_precision_bf16"], size["packed_model"]
    line = f"size       whole model {_megabytes(whole)} in bf16, {_megabytes(packed)} packed ({whole / packed:.1f}x)"
    if "linears_bf16" in size:
        before, after = size["linears_bf16"], size["packed_linears"]
        line += f"; its linear layers {_megabytes(before)} -> {_megabytes(after)} ({before / after:.1f}x)"
    return line
