"""Runs of qat in which one file operation, counted, ends badly; many, as they fork from one process that has imported all.

    with Machine(folder) as machine:
        trial = machine.run(["train", ...], root=run, at=17, mode="kill")

`shim.c` is preloaded into the process and does the harm. A trial has the exit code (negative: the signal that ended it), what was
printed, the operations that were met and how long it took. A run that takes longer than its limit is killed and says `hung`.

Rejected: a new process for each trial, whose imports take longer than the run; patches of Python's own functions, which neither
torch's nor safetensors' writers call.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pickle
import runpy
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("shim.c")
COMPILER = shutil.which("gcc") or shutil.which("g++")
MODES = ("count", "kill", "torn", "eio", "full", "signal", "double")
LIMIT = 40.0
"""Seconds, on a busy machine; what a trial may not exceed on an idle one is asserted by who runs them."""


@dataclass(frozen=True)
class Trial:
    """How one run ended."""

    code: int
    output: str
    operations: list[str]
    seconds: float
    hung: bool

    @property
    def tracebacks(self) -> bool:
        return "Traceback (most recent call last)" in self.output


class Machine:
    """A process that has imported everything and forks for each trial."""

    def __init__(self, folder: Path) -> None:
        assert COMPILER is not None, "gcc is missing"
        self.folder = folder
        library = folder / "shim.so"
        flags = ["-shared", "-fPIC", "-O1", "-x", "c", str(SOURCE), "-o", str(library), "-ldl"]
        subprocess.run([COMPILER, *flags], check=True, capture_output=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        command = [sys.executable, str(Path(__file__)), str(folder)]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._answer() == "ready"

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def run(self, words: list[str], root: Path, at: int = 0, mode: str = "count", number: int = 0) -> Trial:
        """`qat VERB ...`, or MODULE:FUNCTION, with harm at the `at`-th operation below `root`; `number` is a signal's."""
        request = {"words": words, "root": str(root), "at": at, "mode": mode, "number": number, "cwd": str(root.parent)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Trial(**json.loads(self._answer()))

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the machine ended with {self.process.wait()}"
        return line.strip()


def _import_everything(folder: Path) -> None:
    """What a run imports, found by a first one in a child: a process that has computed gradients cannot be forked from."""
    names = folder / "modules.pickle"
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            _verb(json.loads((folder / "first.json").read_text()))
        names.write_bytes(pickle.dumps(sorted(sys.modules)))
        os._exit(0)
    os.waitpid(child, 0)
    for name in pickle.loads(names.read_bytes()):
        if not name.startswith(("_pytest", "test", "__main__")):
            with suppress(BaseException):
                importlib.import_module(name)


def _verb(words: list[str]) -> None:
    """`qat VERB ...`, or MODULE:FUNCTION with its arguments; a ValueError of the function is a user's error, as in verbs."""
    if ":" in words[0]:
        module, _, name = words[0].partition(":")
        return _call(getattr(importlib.import_module(module), name), words[1:])
    sys.argv = [f"qat.{words[0]}", *words[1:]]
    runpy.run_module(f"qat.{words[0]}", run_name="__main__", alter_sys=False)


def _call(function: Any, words: list[str]) -> None:
    from qat.config.flags import run_verb

    sys.exit(run_verb("faults", lambda: function(*words)))


def _child(request: dict[str, Any], log: Path, output: Path) -> None:
    """Never returns."""
    shim: Any = ctypes.CDLL(None)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.default_int_handler if name == signal.SIGINT else signal.SIG_DFL)
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.chdir(request["cwd"])
    place = ctypes.c_long(request["at"])
    shim.fault_arm(os.fsencode(request["root"]), place, MODES.index(request["mode"]), request["number"], os.fsencode(log))
    code = 0
    try:
        _verb(request["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _trial(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    log, output = folder / "operations", folder / "output"
    log.unlink(missing_ok=True)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        _child(request, log, output)
    status, hung = _wait(child, start + LIMIT)
    operations = log.read_text(errors="replace").splitlines() if log.exists() else []
    text = output.read_text(errors="replace") if output.exists() else ""
    seconds = time.monotonic() - start
    return {"code": os.waitstatus_to_exitcode(status), "output": text, "operations": operations, "seconds": seconds, "hung": hung}


def _wait(child: int, until: float) -> tuple[int, bool]:
    handle = os.pidfd_open(child)
    try:
        hung = not select.select([handle], [], [], max(until - time.monotonic(), 0))[0]
    finally:
        os.close(handle)
    if hung:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1], hung


def main() -> None:
    """Answer requests, a line of JSON each."""
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _import_everything(folder)
    answers.write("ready\n")
    for line in sys.stdin:
        answers.write(json.dumps(_trial(json.loads(line), folder)) + "\n")


if __name__ == "__main__":
    main()
