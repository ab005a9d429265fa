"""A case is one trial, or one batch of them, with a name that makes it again."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """`check` raises AssertionError, or returns one line for each failure."""

    row: str
    """Of the table."""
    name: str
    check: Callable[[], list[str] | None]
    trials: int = 1


@dataclass
class Row:
    """A line of the table."""

    kind: str
    trials: int = 0
    failures: int = 0
    seconds: float = 0.0


@dataclass
class Table:
    """All rows, and a line for each failure."""

    rows: dict[str, Row] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def run(self, kind: str, cases: Iterable[Case], every: int = 1, only: str | None = None) -> None:
        """Every `every`-th case of each row, or the one that is named."""
        seen: dict[str, int] = {}
        for case in cases:
            number = seen[case.row] = seen.get(case.row, -1) + 1
            if case.name == only if only else number % every == 0:
                self._one(kind, case)

    def _one(self, kind: str, case: Case) -> None:
        start = time.monotonic()
        wrong = _wrong(case)
        row = self.rows.setdefault(case.row, Row(case.row))
        row.trials, row.failures = row.trials + case.trials, row.failures + len(wrong)
        row.seconds += time.monotonic() - start
        for line in wrong:
            self.failures.append(f"{case.row}: {line}\n    python tests/faults {kind} --only {case.name!r}")
            print(self.failures[-1], flush=True)

    def text(self) -> str:
        """Markdown."""
        lines = ["| what | trials | failures | seconds |", "|---|--:|--:|--:|"]
        lines += [f"| {row.kind} | {row.trials:,} | {row.failures} | {row.seconds:.0f} |" for row in self.rows.values()]
        return "\n".join(lines)


def _wrong(case: Case) -> list[str]:
    try:
        return case.check() or []
    except Exception as error:  # also of a check that reads what a trial left: that is a failure, and the next case is to run
        return [said(error)]


def said(error: Exception) -> str:
    """The message, or the line that was not true."""
    line = traceback.extract_tb(error.__traceback__)[-1].line
    name = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return f"{name}{str(error) or line}"
