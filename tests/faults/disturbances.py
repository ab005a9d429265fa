"""A kill, a torn write, a signal, an I/O error and a full disk at every file operation of runs and exports."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from faults.cases import Case, said
from faults.machine import Machine, Trial
from faults.promises import refused, signalled
from faults.scenes import Export, Run, Scene

Check = Callable[[Scene, Trial, int], None]


def _killed(scene: Scene, trial: Trial, number: int) -> None:
    assert trial.code == -signal.SIGKILL, f"exit code {trial.code}"


def _signalled(scene: Scene, trial: Trial, number: int) -> None:
    if isinstance(scene, Run):
        signalled(scene.root, trial, number, scene.begun)
    else:
        assert trial.code in (0, 128 + number, -number), f"exit code {trial.code}"


def _refused(scene: Scene, trial: Trial, number: int) -> None:
    refused(trial, "qat.train: " if isinstance(scene, Run) else "qat.faults: ")


# kind -> (row, mode of the shim, signal, what must be true of how it ended)
HARM: dict[str, list[tuple[str, str, int, Check]]] = {
    "kills": [("killed", "kill", 0, _killed), ("killed amid a write", "torn", 0, _killed)],
    "signals": [
        ("SIGINT", "signal", signal.SIGINT, _signalled),
        ("SIGTERM", "signal", signal.SIGTERM, _signalled),
        ("SIGHUP", "signal", signal.SIGHUP, _signalled),
        ("SIGINT twice", "double", signal.SIGINT, _signalled),
    ],
    "disk": [("I/O error", "eio", 0, _refused), ("full disk", "full", 0, _refused)],
}


def cases(kind: str, machine: Machine, scenes: Sequence[Scene]) -> Iterator[Case]:
    """Each harm of `kind` at each operation that the undisturbed scene has."""
    for scene in scenes:
        count = len(scene.disturbed(machine).operations)
        what = "export" if isinstance(scene, Export) else "run"
        for words, mode, number, check in HARM[kind]:
            for at in range(1, count + 1):
                name = f"{scene.name} {mode} {number} {at}"
                row = f"{what} ({scene.name}), {words} at each of {count} file operations"
                yield Case(row, name, partial(attempt, machine, scene, at, mode, number, check))


def attempt(machine: Machine, scene: Scene, at: int, mode: str, number: int, check: Check) -> None:
    """One trial: what it leaves, and what going on makes of that."""
    trial = scene.disturbed(machine, at, mode, number)
    place = trial.operations[at - 1] if len(trial.operations) >= at else "never reached"
    try:
        check(scene, trial, number)
        scene.check(trial)
        scene.go_on(machine)
    except Exception as error:
        raise AssertionError(f"{said(error)} (at {place})") from error
