"""What the steps of a run found, and result.json, made of it from the first moment to the last, whatever ends the run."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Any

import qat
from qat import parallel
from qat.config import TrainConfig
from qat.conversion.record import Conversion
from qat.reporting.page.render import write_report
from qat.reporting.result import Perplexity, RunResult, Stages
from qat.reporting.table import REPORT
from qat.tasks import TASKS
from qat.training.checkpoints import newest
from qat.training.exports import Exported
from qat.training.fit import FitResult
from qat.training.release.best import Chosen
from qat.training.signals import Interrupted


@dataclass(frozen=True)
class Facts:
    """What is known of a run; a step that was not made has left nothing."""

    config: TrainConfig
    conversion: Conversion
    folder: str = ""
    status: str = "running"
    data: dict[str, Any] = field(default_factory=dict)
    """Of `qat.data.account`."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """Of a start from calibrated codes."""
    texts: dict[str, Stages] = field(default_factory=dict)
    """Text -> what is measured on it; '' is the recipe's own."""
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    """Stage -> text -> perplexity, or accuracy and F1."""
    training: FitResult | None = None
    chosen: Chosen | None = None
    """Whose weights are packed."""
    logit_difference: float | None = None
    """Between trained and packed model."""
    bytes: dict[str, int] = field(default_factory=dict)
    exports: list[Exported] | None = None
    hub: dict[str, Any] = field(default_factory=dict)
    """Where it was pushed."""
    control: FitResult | None = None
    seconds: float | None = None
    signal: int | None = None


def assembled(facts: Facts) -> RunResult:
    """The result of a run: all of it is put together here."""
    values = {name: replace(about, stages=_stages(facts, name)) for name, about in facts.texts.items()}
    done, own = facts.training, values.pop("", Perplexity())
    return RunResult(
        status=facts.status,
        recipe=facts.config.run.name,
        folder=facts.folder,
        **{own.measure: own},  # type: ignore[arg-type]
        further=values,
        packed_from=facts.chosen.facts() if facts.chosen else {},
        data=facts.data,
        conversion=facts.conversion.facts(),
        calibration=facts.calibration,
        export=_exports(facts.exports),
        verification=_verification(facts),
        bytes={**facts.bytes, **{one.name: one.bytes for one in facts.exports or [] if one.bytes is not None}},
        hub=facts.hub,
        tokens=done.tokens if done else None,
        seconds=done.seconds if done else None,
        tokens_per_second=done.tokens_per_second if done else None,
        control=_control(facts),
        seconds_total=facts.seconds,
        versions=versions(),
        config_hash=config_hash(facts.config),
        signal=facts.signal,
    )


def _stages(facts: Facts, text: str) -> dict[str, float]:
    found = {stage: values[text] for stage, values in facts.stages.items() if text in values}
    exported = [one.perplexity[text] for one in facts.exports or [] if text in one.perplexity]
    return {**found, "exported": exported[0]} if exported else found


def _exports(exports: list[Exported] | None) -> dict[str, Any]:
    if exports is None:
        return {}
    skipped = {one.name: one.skipped for one in exports if one.skipped is not None}
    return {"done": [one.name for one in exports if one.skipped is None], "skipped": skipped}


def _verification(facts: Facts) -> dict[str, Any]:
    if facts.logit_difference is None:
        return {}
    done = [one for one in facts.exports or [] if one.skipped is None]
    lines = [f"packed = trained to the bit (logits and {facts.texts[''].measure})", *(line for one in done for line in one.lines)]
    return {"packed_max_logit_difference": facts.logit_difference, "summary": lines, **{one.name: one.facts for one in done}}


def _control(facts: Facts) -> dict[str, Any]:
    done = facts.control
    return {"tokens": done.tokens, "seconds": done.seconds, "lr": facts.config.control.lr} if done else {}


def versions() -> dict[str, str]:
    """What a number depends on."""
    packages = {name: version(name) for name in ("torch", "lightning", "transformers", "numpy")}
    machine = platform.processor() or platform.machine()
    return {"qat": qat.__version__, "python": platform.python_version(), **packages, "machine": machine}


def config_hash(config: TrainConfig) -> str:
    """sha256 of the configuration without the folder it is written to, so equal work has equal hashes."""
    plain = asdict(config)
    plain.pop("run")
    plain.pop("resume")
    return hashlib.sha256(repr(sorted(plain.items())).encode()).hexdigest()[:16]


class Book:
    """The facts of a run that is going on; each addition is in result.json at once."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.save()

    @property
    def result(self) -> RunResult:
        """The facts so far, assembled."""
        return assembled(self.facts)

    def add(self, **found: Any) -> None:
        """Note what a step returned, by the names of `Facts`."""
        self.facts = replace(self.facts, **found)
        self.save()

    def measured(self, stage: str, values: dict[str, float]) -> None:
        """Note and print what was measured of a stage."""
        self.add(stages={**self.facts.stages, stage: values})
        task = TASKS[self.facts.config.task]
        print(f"{task.measure} {stage.replace('_', ' ')}: {values['']:{task.unit}}", flush=True)

    def interrupted(self, signal: int, control: bool = False) -> None:
        """Say that a signal ended the run, or its control, and at which step it will go on."""
        folder, where = Path(self.facts.folder), "in the control run " if control else ""
        found = newest((folder / "control" if control else folder) / "checkpoints")
        step = found.step if found else 0
        self.add(signal=signal, status=f"interrupted {where}at step {step}; continue with {quote(f'resume={self.facts.folder}')}")
        if not self.facts.stages:  # nor is there a table that would say it
            print(f"run        {self.facts.folder} ({self.facts.status})", flush=True)

    def save(self) -> None:
        """Write result.json, on the first rank."""
        if parallel.first():
            self.result.save(Path(self.facts.folder))


@contextmanager
def recording(facts: Facts) -> Iterator[Book]:
    """Keep result.json readable: it says `failed: ...` when an error ends the run, and how to go on when a signal does."""
    start, book = time.perf_counter(), Book(facts)
    try:
        yield book
    except Interrupted as signal:
        book.interrupted(signal.number)
    except BaseException as error:
        book.add(status=f"failed: {error or type(error).__name__}")
        raise
    finally:
        book.add(seconds=time.perf_counter() - start)
        if parallel.first():
            write_page(Path(facts.folder))
            _say_where(book.facts)


def _say_where(facts: Facts) -> None:
    """The page and the checkpoint of a run that failed while it trained: there is no table that would name them."""
    page = Path(facts.folder) / REPORT
    if facts.status.startswith("failed") and page.is_file() and (page.parent / "metrics.csv").is_file():
        print(f"report     {page}", flush=True)
        _say_checkpoint(facts.folder)


def _say_checkpoint(folder: str) -> None:
    """A line on the newest one, if there are any."""
    try:
        found = newest(Path(folder) / "checkpoints")
    except ValueError as error:  # what ended the run is said besides
        print(f"checkpoint {error}", flush=True)
        return
    if found is not None:
        command = f"python -m qat.train {quote(f'resume={folder}')}"
        print(f"checkpoint of step {found.step}; to go on from there: {command}", flush=True)


def write_page(folder: Path) -> None:
    """Write report.html beside result.json; what is wrong with a picture of the run does not end the run."""
    try:
        write_report(folder)
    except Exception as error:
        print(f"{folder}: report.html was not written: {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
