"""A run's folder: made for one run alone, and held by one process at a time."""

from __future__ import annotations

import itertools
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from shlex import quote

from qat import parallel
from qat.config import TrainConfig
from qat.config.compose.resume import Changes, record
from qat.config.compose.saved import save_config
from qat.reporting.origin import note_start
from qat.reporting.page.reading import LOCK
from qat.storage.names import sweep_folder
from qat.terminal.lines import say
from qat.training.checkpoints import newest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TIME = "%Y-%m-%d_%H-%M-%S"
_IS_TIME = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")


@contextmanager
def opened(config: TrainConfig) -> Iterator[Path]:
    """The folder of a new run, with its config.yaml, or that of the run to resume, with what changes; locked to the end.

    Rank 0 chooses and holds it for all.

    Raises:
        ValueError: the folder already holds a run, or a run that is alive has it.
    """
    with ExitStack() as stack:
        yield parallel.shared(lambda: stack.enter_context(_held(config)))


@contextmanager
def _held(config: TrainConfig) -> Iterator[Path]:
    folder = Path(config.resume) if config.resume else made(config)
    with locked(folder):
        if config.resume:
            found = newest(folder / "checkpoints")
            step = found.step if found else 0
            say(_going_on(folder, step, record(config, step)))
            note_start(folder, step)
        else:
            _check_unused(folder)
            _write_config(config, folder)
            note_start(folder, 0)
        yield folder


def _going_on(folder: Path, step: int, changes: Changes) -> str:
    """`runs/a goes on after step 12; changed: optim.lr 0.001 -> 0.002`."""
    said = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changes.items())
    return f"{folder} goes on after step {step}" + (f"; changed: {said}" if said else "")


def check_target(config: TrainConfig) -> None:
    """Refuse, before anything is loaded, a run.dir that cannot become the folder of a new run.

    Raises:
        ValueError: it holds a run, one that is alive has it, or it or what it would lie in is a file or may not be written.
    """
    folder = Path(config.run.dir or "runs")
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        raise ValueError(f"run.dir={folder}: {there} is a file; choose another folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"run.dir={folder}: {there} may not be written; choose another folder")
    with locked(folder) if (folder / LOCK).exists() else nullcontext():
        _check_unused(folder)


def made(config: TrainConfig) -> Path:
    """Make run.dir. One that is named by the second goes to the first who makes it, and the next one gets another name."""
    wanted = Path(config.run.dir or f"runs/{config.run.name}/{time.strftime(_TIME)}")
    if not _IS_TIME.fullmatch(wanted.name):
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def holds_run(folder: Path) -> bool:
    """Whether there is one to continue; what came no further than its configuration is begun anew."""
    return (folder / "config.yaml").exists() and ((folder / "metrics.csv").exists() or (folder / "checkpoints").exists())


def is_named_by_time(folder: Path) -> bool:
    """Whether it is a new one every second, itself or as the folder of a sweep's jobs."""
    return any(_IS_TIME.fullmatch(name) for name in folder.parts[-2:])


def _check_unused(folder: Path) -> None:
    if holds_run(folder):
        raise ValueError(f"{folder} already holds a run; continue it with {quote(f'resume={folder}')}, or choose another run.dir")


def _write_config(config: TrainConfig, folder: Path) -> None:
    if config.run.dir is not None:
        config = replace(config, run=replace(config.run, dir=str(folder)))
    save_config(config, folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder: a lock of the system's (flock), which goes with the process, however that ends.

    Raises:
        ValueError: another process holds it.
    """
    if fcntl is None:
        yield
        return
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = " ".join(file.read().split()) or "unknown"
            raise ValueError(f"{folder} belongs to a run that is alive, process {holder}; wait for it, or stop it") from None
        except OSError as error:
            print(f"{folder}: locks do not work here ({error.strerror}), so nothing keeps a second run out of the folder")
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        for place in (folder, folder / "checkpoints"):  # what a kill left there and nobody writes again
            sweep_folder(place)
        yield
