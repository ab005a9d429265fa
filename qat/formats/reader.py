"""Ask a format's reader in a process of its own: what it answers is what a stranger gets, and if it ends, only it ends.

A reader is a script that is called with the file or folder, a request and the answer to write, by their names. The rules of every
such process are here: its environment, its time, and what is quoted where it fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
MOST_SECONDS = 6 * 3600.0
_ROOT = Path(__file__).resolve().parents[2]
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # libgomp's threads spin otherwise, which a busy machine punishes
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Reader:
    """How to ask one reader."""

    script: Path
    failure: str
    """Said in front of the reader's last words, with {} for the file or folder."""
    sees_qat: bool = False
    """Whether the script may import qat."""
    environment: Mapping[str, str] = field(default_factory=dict)
    lines: int = 1
    """How many of its last words are quoted."""

    def ask(
        self,
        path: str | Path,
        write: Callable[[Path], object],
        read: Callable[[Path], T],
        *,
        seconds: float = MOST_SECONDS,
        suffix: str = "",
    ) -> T:
        """Let `write` put the request into a file, run the script, and `read` its answer.

        Raises:
            ValueError: the reader fails, is killed, or takes longer than `seconds`; with its last words.
        """
        with tempfile.TemporaryDirectory(prefix="qat-reader-") as scratch:
            asked, answered = Path(scratch, f"request{suffix}"), Path(scratch, f"answer{suffix}")
            write(asked)
            command = [sys.executable, "-P", str(self.script), str(Path(path).absolute()), str(asked), str(answered)]
            try:
                done = subprocess.run(
                    command,
                    env=self._environment(),
                    cwd=scratch,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=seconds,
                )
            except subprocess.TimeoutExpired as error:
                raise ValueError(f"{self.failure.format(path)}: no answer within {seconds:g} seconds") from error
            if done.returncode or not answered.is_file():
                raise ValueError(f"{self.failure.format(path)}: {self._last_words(done)}")
            return read(answered)

    def _environment(self) -> dict[str, str]:
        """Ours, with the way to qat or without it."""
        path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != _ROOT]
        path = [str(_ROOT), *path] if self.sees_qat else path
        return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **_ENVIRONMENT, **self.environment}

    def _last_words(self, done: subprocess.CompletedProcess[str]) -> str:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        if done.returncode < 0:
            lines.append(f"ended by signal {-done.returncode}")
        return " / ".join(lines[-self.lines :]) or f"exit code {done.returncode}"
