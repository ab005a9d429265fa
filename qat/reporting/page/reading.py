"""What a run's folder holds, read for people: whatever is damaged or not there yet is said or left out, and breaks nothing."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qat.config.compose.resume import HISTORY
from qat.config.compose.yaml_files import plain_values
from qat.monitor import alarms, layers
from qat.monitor.alarms import Alarm
from qat.reporting.result import RunResult, read_result
from qat.storage import json_lines, parse_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""A file that the run's process holds (flock)."""
STARTS = "starts.jsonl"
"""A line for each time that a run was started: time, step, command, commit."""
SAMPLES = "samples.json"
LATENTS = "latents.json"
DAMAGE = "damage.json"


@dataclass(frozen=True)
class Series:
    """One column of metrics.csv where it has a value."""

    steps: list[int]
    values: list[float]

    @property
    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [value for value in self.values if math.isfinite(value)]


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it."""

    folder: Path
    result: RunResult
    config: dict[str, Any]
    metrics: dict[str, Series] = field(default_factory=dict)
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    alarms: list[Alarm] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)
    latents: dict[str, Any] = field(default_factory=dict)
    damage: dict[str, Any] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    """Files that could not be read."""
    killed: bool = False
    """It has not ended, and no process holds its folder."""

    @property
    def name(self) -> str:
        """What the run is called."""
        return str(self.get("run.name", self.result.recipe or self.folder.name))

    @property
    def step(self) -> int:
        """The last step with a row."""
        return max((series.steps[-1] for series in self.metrics.values()), default=0)

    @property
    def done(self) -> bool:
        """It came to its end."""
        return self.result.status == "done" or self.result.status.startswith("stopped")

    @property
    def divergence(self) -> Alarm | None:
        """The alarm that says so, while it holds."""
        return next((one for one in self.alarms if one.kind == "divergence" and one.until is None), None)

    def get(self, key: str, default: Any = None) -> Any:
        """The configuration's value of a key with dots."""
        node: Any = self.config
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node

    def last(self, name: str) -> float | None:
        """The last finite value of a metric."""
        found = self.metrics[name].finite if name in self.metrics else []
        return found[-1] if found else None


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        ValueError: it holds none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no run: {'it is a file' if folder.exists() else 'there is no such folder'}")
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no run: there is no config.yaml in it")
    damaged: list[str] = []

    def read(name: str, reader: Callable[[Path], Any], usual: Any) -> Any:
        try:
            return reader(folder / name) if (folder / name).exists() else usual
        except (ValueError, OSError, KeyError, TypeError) as error:
            damaged.append(f"{name}: {' '.join(str(error).split())[:200]}")
            return usual

    result = read_result(folder)
    if result is None or not _sound(result):
        damaged += ["result.json"] if (folder / "result.json").exists() else []
        result = RunResult(status="no result.json")
    return Run(
        folder,
        result,
        read("config.yaml", plain_values, {}),
        read("metrics.csv", read_metrics, {}),
        read(layers.NAME, lambda file: layers.read_layers(file.parent), {}),
        read(alarms.NAME, lambda file: alarms.read_alarms(file.parent), []),
        starts=read(STARTS, _lines, []),
        changes=read(HISTORY, _lines, []),
        samples=read(SAMPLES, _mapping, {}),
        latents=read(LATENTS, _mapping, {}),
        damage=read(DAMAGE, _mapping, {}),
        damaged=damaged,
        killed=result.status == "running" and _left(folder / LOCK),
    )


def without_metrics(folders: Sequence[Path]) -> list[Path]:
    """The runs whose metrics.csv is missing, or has no row."""
    files = {folder: folder / "metrics.csv" for folder in folders}
    return [folder for folder, file in files.items() if not file.is_file() or not read_metrics(file)]


def _left(lock: Path) -> bool:
    """Whether nobody holds a run's lock, which goes with its process; False where that cannot be known."""
    if fcntl is None:
        return False
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sound(result: RunResult) -> bool:
    """Its sections are mappings, its status is a text and what was measured are numbers, whoever wrote the file."""
    usual = RunResult()
    kinds = {name: type(value) for name, value in vars(usual).items() if isinstance(value, dict | str)}
    if not all(isinstance(getattr(result, name), kind) for name, kind in kinds.items()):
        return False
    texts = (result.perplexity, result.accuracy, *result.further.values())
    counts = (one for one in (result.tokens, result.seconds, result.tokens_per_second, result.seconds_total) if one is not None)
    return all(map(_is_number, (*result.bytes.values(), *counts, *(value for text in texts for value in text.values()))))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_metrics(file: Path) -> dict[str, Series]:
    """Column -> its series; lines that are torn, or whose cells are no numbers, are passed over."""
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        rows = list(_rows(csv.reader(line.replace("\0", "?") for line in lines)))
    found: dict[str, Series] = {}
    for row in rows:
        step = int(row["step"])
        for key, value in row.items():
            if key != "step":
                series = found.setdefault(key, Series([], []))
                series.steps.append(step)
                series.values.append(value)
    return found


def _rows(reader: Iterator[list[str]]) -> Iterator[dict[str, float]]:
    names = next(reader, [])
    if "step" not in names:
        return
    for cells in reader:
        try:
            row = {name: float(cell) for name, cell in zip(names, cells, strict=True) if cell}
            if math.isfinite(row["step"]):
                yield row
        except (ValueError, KeyError):
            continue


def _mapping(file: Path) -> dict[str, Any]:
    found = parse_json(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("no mapping")
    return found


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines; one that a kill tore is left out."""
    return [*json_lines(file.read_text(encoding="utf-8", errors="replace"))]
