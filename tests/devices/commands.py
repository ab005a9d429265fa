"""Commands of several processes in tests: what they say, which processes are theirs, and none of them left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 900.0
"""Seconds for a command that ends by itself, on a machine that is busy."""


class Command:
    """A command line in a group of processes of its own, which is killed at the end of the test whatever becomes of it."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "QAT_CACHE": str(folder / "cache"), "GLOO_SOCKET_IFNAME": "lo"}
        self.output = folder / "output.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                arguments, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def ended(self, seconds: float = PATIENCE) -> int:
        """The exit code, once nothing is left of what it had started by now."""
        until, everyone = time.monotonic() + seconds, _below(self.process.pid)
        code = self.process.wait(seconds)
        while (left := [one for one in everyone if _lives(one)]) and time.monotonic() < until:
            time.sleep(0.1)
        assert not left, f"processes are left: {left}"
        return code

    def reaches(self, file: Path, words: str) -> None:
        until = time.monotonic() + PATIENCE
        while not (file.exists() and words in file.read_text()):
            assert self.process.poll() is None and time.monotonic() < until, self.text
            time.sleep(0.02)

    def ranks(self) -> list[int]:
        """The processes of the two ranks, in order, while they live."""
        return sorted(one for one in _below(self.process.pid) if _is_rank(one))

    def rank(self, number: int) -> int:
        """The process of a rank."""
        assert len(self.ranks()) == 2, self.ranks()
        return self.ranks()[number]

    def close(self) -> None:
        for one in _below(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _below(process: int) -> list[int]:
    """All that it has started, and they; torchrun's workers have a group of their own."""
    try:
        return [one.pid for one in psutil.Process(process).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _lives(number: int) -> bool:
    try:
        return bool(psutil.Process(number).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _is_rank(number: int) -> bool:
    """Which of the group train: those that hold a text or a model open, not the launcher's helpers."""
    try:
        words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"qat.train" in words or any(b"spawn_main" in word for word in words)


def once(text: str, *lines: str) -> None:
    for line in lines:
        assert text.count(line) == 1, (line, text)
