"""Signals where there is no step to wait for, and those that a process was started to ignore."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qat.training.signals import Interrupted, listening

ROOT = Path(__file__).resolve().parents[2]
DURING_AN_IMPORT = """
import os, sys
from importlib.abc import MetaPathFinder

class Careful(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "lightning":
            try:
                os.kill(os.getpid(), int(sys.argv.pop()))
            except BaseException:
                raise ImportError("caught, as many a package does with what it tries to import")

sys.meta_path.insert(0, Careful())
from qat.train import main
main(["model.path=x", "data.train=y.txt"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_imported_is_not_caught_by_them(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DURING_AN_IMPORT, str(int(number))]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (128 + number, f"qat.train: interrupted by signal {int(number)}\n")


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening() as signals, signals.wait_for_step():
            signals.listen()
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.asked is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with pytest.raises(Interrupted), listening():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
