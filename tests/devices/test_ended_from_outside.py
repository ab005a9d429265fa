"""What signals and kills make of the command itself with two devices, by torchrun and plain."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from commands import Command, once

NO_HANG = 20.0
"""Seconds in which all must have ended after one process did, on a machine that does nothing else."""

LONG = ["trainer.max_steps=100000", "trainer.checkpoint_every=5", "trainer.val_every=null", "export.formats=[]"]


def _at_a_step(start: Any, settings: list[str], folder: Path, strategy: str, torchrun: bool) -> Command:
    """A run that is somewhere in one of its steps 6 to 16."""
    chance = Random(f"{strategy} {torchrun}")
    devices = [] if torchrun else ["trainer.devices=2"]
    command = start(*settings, *LONG, *devices, f"trainer.strategy={strategy}", f"run.dir={folder}", torchrun=torchrun)
    command.reaches(folder / "metrics.csv", f"\n{chance.randrange(6, 17)},")
    time.sleep(0.2 * chance.random())
    return command


def _ended_in_time(command: Command) -> int:
    busy = max(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0)
    began, code = time.monotonic(), command.ended(NO_HANG * busy + 60)
    assert time.monotonic() - began < NO_HANG * busy
    return code


def _kept(folder: Path) -> int:
    """The step of the checkpoint."""
    return int(torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"])


@pytest.mark.parametrize(
    ("strategy", "torchrun", "killed"), [("ddp", False, 0), ("ddp", True, 1), ("fsdp2", True, 0), ("fsdp2", False, 1)]
)
def test_kill_of_a_rank(start: Any, settings: list[str], tmp_path: Path, strategy: str, torchrun: bool, killed: int):
    folder = tmp_path / "run"
    command = _at_a_step(start, settings, folder, strategy, torchrun)
    os.kill(command.rank(killed), signal.SIGKILL)
    assert _ended_in_time(command) == 1
    assert _kept(folder) % 5 == 0 and _kept(folder) >= 5
    status = json.loads((folder / "result.json").read_text())["status"]
    assert status == "running" or (killed == 1 and status.startswith("failed: a process of this run ended")), status


@pytest.mark.parametrize(
    ("number", "strategy", "torchrun", "whom"),
    [
        (signal.SIGTERM, "ddp", False, None),
        (signal.SIGTERM, "fsdp2", True, None),
        (signal.SIGINT, "fsdp2", False, None),
        (signal.SIGINT, "ddp", True, 0),
        (signal.SIGINT, "fsdp2", False, 1),
    ],
)
def test_signals(
    start: Any, settings: list[str], tmp_path: Path, number: int, strategy: str, torchrun: bool, whom: int | None
) -> None:
    """To the launcher, or to a rank alone; torchrun has an exit code of its own."""
    folder = tmp_path / "run"
    command = _at_a_step(start, settings, folder, strategy, torchrun)
    os.kill(command.process.pid if whom is None else command.rank(whom), number)
    assert _ended_in_time(command) == (1 if torchrun else 128 + number)
    result, step = json.loads((folder / "result.json").read_text()), _kept(folder)
    assert result["status"] == f"interrupted at step {step}; continue with resume={folder}" and step >= 6
    once(command.text, f"run        {folder} (interrupted")
