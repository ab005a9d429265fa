"""metrics.csv: a header fixed at the start, rows appended whole, so that no kill loses a row that was there.

A row is one optimizer step (1 is the first) or one validation after it. Rows of training are written before the step's
checkpoint: lightning logs after its callbacks, so a kill between the two would leave a checkpoint whose row nobody writes again.
Columns are names of `qat.monitor.table`; earlier versions wrote an `epoch` beside them, which was 0.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

from qat.storage import write_text
from qat.training.callbacks.boundary import step_ends

Row = dict[str, str]
FIRST = ["step", "tokens"]
_NO_METRIC = ("step", "epoch")  # which lightning adds of itself


class MetricsFile(Logger):
    """lightning's logger into `file`. It is made with its first row. A column that nobody announced
    is added by writing the file anew, whole or not at all."""

    def __init__(self, file: Path, columns: Iterable[str], rows: list[Row] | None = None) -> None:
        super().__init__()
        self.file, rows = file, rows or []
        names = {key for row in rows for key in row} | set(columns)
        self.columns = [*FIRST, *sorted(names - set(FIRST))]
        self._last: tuple[int, set[str]] = (0, set())
        file.unlink(missing_ok=True) if not rows else self._rewrite(rows)

    @property
    def name(self) -> str:
        """None of its own: what other callbacks write lies beside the file."""
        return ""

    version = name

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.file.parent)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They are in config.yaml."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row of what this step's rows do not hold yet; NaN says that this step did not measure it."""
        step = int(step or 0)
        known = self._last[1] if self._last[0] == step else set()
        fresh = {key: value for key, value in metrics.items() if key not in known and key not in _NO_METRIC}
        new = {key: value for key, value in fresh.items() if not math.isnan(value)}
        if not new:
            return
        if set(new) - set(self.columns) or not self.file.exists():
            rows = read_rows(self.file)[0]
            self.columns += sorted(set(new) - set(self.columns))
            self._rewrite(rows)
        with self.file.open("a", encoding="utf-8", newline="") as file:
            file.write(self._text([{"step": str(step), **{key: str(value) for key, value in new.items()}}]))
        self._last = (step, known | new.keys())

    def _rewrite(self, rows: list[Row]) -> None:
        write_text(self.file, ",".join(self.columns) + "\n" + self._text(rows))

    def _text(self, rows: list[Row]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()


class WriteRows(pl.Callback):
    """Writes the row of every `every`-th step when the step ends; it stands before whatever writes checkpoints.

    What other callbacks measured of the step lies in `row`, which they share; loggers get it too, and it is emptied. Logging it
    through lightning would repeat each value in every later row.
    """

    def __init__(self, file: MetricsFile, every: int, row: dict[str, float]) -> None:
        self.file, self.every, self.row = file, every, row

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What was logged as train/... up to here."""
        if not step_ends(trainer, batch_idx):
            return
        due = trainer.global_step % self.every == 0
        self.file.log_metrics({**self.row, **(trained(trainer) if due else {})}, trainer.global_step)
        for logger in trainer.loggers if self.row else ():
            if logger is not self.file:
                logger.log_metrics(dict(self.row), trainer.global_step)
        self.row.clear()


def trained(trainer: pl.Trainer) -> dict[str, float]:
    """What is logged of the step as train/...; where it lies on a GPU, that is waited for."""
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("train/")}


def continued(file: Path, columns: Iterable[str], step: int | None) -> MetricsFile:
    """metrics.csv that goes on from `step`: later rows are dropped, and those that do not parse are, with a word."""
    if step is None or not file.exists():
        return MetricsFile(file, columns)
    rows, damaged = read_rows(file)
    if damaged:
        print(f"{file}: {damaged} rows do not parse and are dropped")
    return MetricsFile(file, columns, [row for row in _from_one(rows) if int(row["step"]) <= step])


def read_rows(file: Path) -> tuple[list[Row], int]:
    """The rows, without their empty cells, and how many lines are none: torn, or with cells that are no numbers or names.

    A run that ended before its first row has no file.
    """
    if not file.exists():
        return [], 0
    header, *lines = file.read_text(encoding="utf-8", errors="replace").replace("\0", "?").split("\n")
    names = header.rstrip("\r").split(",")
    odd = {name for name in names if not re.fullmatch(r"[\w/.-]+", name)}  # of a damaged header
    torn = lines.pop() if lines else ""  # what follows the last line's end
    rows = [dict(zip(names, cells, strict=True)) for line in lines if _is_row(cells := line.rstrip("\r").split(","), names)]
    damaged = len(lines) - len(rows) + bool(torn) + bool(odd)
    return [{key: value for key, value in row.items() if value and key not in odd} for row in rows], damaged


def _is_row(cells: list[str], names: list[str]) -> bool:
    if len(cells) != len(names) or "step" not in names:
        return False
    try:
        int(cells[names.index("step")])
        return all(cell == "" or float(cell) is not None for cell in cells)
    except ValueError:
        return False


def _from_one(rows: list[Row]) -> list[Row]:
    """Earlier versions counted from 0: their rows of every n-th step say n - 1, 2 n - 1, ..."""
    steps = [int(row["step"]) for row in rows if "train/loss" in row]
    if not steps or not (steps[0] == 0 or (len(steps) > 1 and steps[1] - steps[0] == steps[0] + 1)):
        return rows
    return [{**row, "step": str(int(row["step"]) + 1)} for row in rows]
