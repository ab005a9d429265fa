"""A run of a tiny model, for tests of several modules: how it is started, killed and resumed, and what it wrote."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from qat.config import RunConfig, TrainConfig, TrainerConfig
from qat.config.compose.saved import load_config
from qat.train import run

ROOT = Path(__file__).resolve().parents[2]
TRAINER = TrainerConfig(max_steps=12, accelerator="cpu", progress=False, log_every_n_steps=1, threads=1)


def losses(folder: Path) -> dict[int, str]:
    with (folder / "metrics.csv").open() as lines:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(lines) if row["train/loss"]}


def killed_and_resumed(config: TrainConfig, folder: Path, step: int, checkpoint_every: int) -> Path:
    """The folder of a run that died at a step and went on from the checkpoint before it."""
    config.run = RunConfig(name="tiny", dir=str(folder))
    config.trainer = replace(config.trainer, checkpoint_every=checkpoint_every)
    stop_after(config, step)
    run(load_config(str(folder)))
    return folder


def stop_after(config: TrainConfig, step: int) -> None:
    """Die at a step as a killed process would: no checkpoint is written on the way out."""

    class Killed(BaseException):
        pass

    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == step:
                raise Killed

    original = pl.Trainer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pl.Trainer, "__init__", lambda self, *a, callbacks, **k: original(self, *a, callbacks=[*callbacks, Kill()], **k)
        )
        with pytest.raises(Killed):
            run(config)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qat.train", *arguments]


def overrides(config: TrainConfig, folder: Path, **more: Any) -> list[str]:
    data = {
        "recipe": "plain",
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
    deadline = time.time() + 300  # a machine may be busy
    while not awaited.exists():
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.05)
    return process
