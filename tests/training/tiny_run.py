"""A run of a tiny model, for tests of several modules: how it is started from the command line, and what it wrote."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qat.config import TrainConfig, TrainerConfig

ROOT = Path(__file__).resolve().parents[2]
TRAINER = TrainerConfig(max_steps=12, accelerator="cpu", progress=False, log_every_n_steps=1, threads=1)


def losses(folder: Path) -> dict[int, str]:
    with (folder / "metrics.csv").open() as lines:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(lines) if row["train/loss"]}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qat.train", *arguments]


def overrides(config: TrainConfig, folder: Path, **more: Any) -> list[str]:
    data = {
        "model.path": config.model.path,
        "data.train": config.data.train,
        "data.sequence_length": 32,
        "data.batch_size": 4,
        "data.valid_fraction": 0.1,
        "optim.lr": 5e-3,
        "trainer.log_every_n_steps": 1,
        "trainer.threads": 1,
        "trainer.progress": "false",
        "export.formats": "[]",
        "run.dir": folder,
        **more,
    }
    return [f"{key}={value}" for key, value in data.items()]


def started(arguments: list[str], awaited: Path) -> subprocess.Popen[str]:
    """The command line in a process of its own, once it has written the file `awaited`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not awaited.exists():
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.05)
    return process
