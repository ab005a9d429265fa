"""Markdown tables of what `python -m qat.bench --json FILE` wrote: `python benchmarks/table.py FILE...`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def table(header: list[str], lines: list[list[str]]) -> None:
    """Print one table, the first column left-aligned."""
    print("| " + " | ".join(header) + " |")
    print("|---|" + "---:|" * (len(header) - 1))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def linear_cell(row: dict[str, Any]) -> str:
    """GOP/s, the share of the limit, and the speed against dynamic int8."""
    share = f", {row['share']:.0%}" if row["share"] else ""
    ratio = f" ({row['ratio']:.2f}x)" if row["ratio"] else ""
    return f"{row['gops']:.0f}{share}{ratio}"


def print_linear(rows: Rows) -> None:
    """One table for each number of threads, tokens and hot or cold: shapes down, peers across."""
    groups: dict[tuple[int, int, str], Rows] = defaultdict(list)
    for row in rows:
        if not row["regime"].startswith("train"):
            groups[row["threads"], row["tokens"], row["regime"]].append(row)
    for (threads, tokens, regime), members in groups.items():
        names = list(dict.fromkeys(row["what"] for row in members))
        found = {(row["shape"], row["what"]): linear_cell(row) for row in members}
        print(f"**{tokens} token{'s' * (tokens > 1)}, {regime}, {threads} thread{'s' * (threads > 1)}** (GOP/s)\n")
        shapes = dict.fromkeys(row["shape"] for row in members)
        table(["N x K", *names], [[shape, *(found.get((shape, name), "-") for name in names)] for shape in shapes])


def print_training(rows: Rows) -> None:
    """Milliseconds of a step, and the ratio to nn.Linear: layers down, shapes across."""
    groups: dict[tuple[str, int, int], Rows] = defaultdict(list)
    for row in rows:
        if row["regime"].startswith("train"):
            groups[row["regime"], row["tokens"], row["threads"]].append(row)
    for (regime, tokens, threads), members in groups.items():
        shapes = list(dict.fromkeys(row["shape"] for row in members))
        found = {(row["shape"], row["what"]): f"{row['microseconds'] / 1e3:.0f} ms ({row['ratio']:.2f}x)" for row in members}
        print(f"**{regime}, forward + backward, {tokens} tokens, {threads} threads**\n")
        names = dict.fromkeys(row["what"] for row in members)
        table(["layer", *shapes], [[name, *(found.get((shape, name), "-") for shape in shapes)] for name in names])


def main() -> None:
    """Print every file's environment and tables."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for file in sys.argv[1:]:
        result = json.loads(Path(file).read_text())
        print(", ".join(f"{key} {value}" for key, value in result["environment"].items()) + "\n")
        print_linear(result["rows"])
        print_training(result["rows"])


if __name__ == "__main__":
    main()
