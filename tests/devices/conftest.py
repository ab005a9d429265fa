"""A model whose numbers are no chance: ranks draw other random numbers than one process would."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from labelled import ROWS, write_bert, write_table
from several import tiny
from tiny import write_model

from qat.config import DataConfig, DistillConfig, TrainConfig
from qat.parallel.group import free_port


@pytest.fixture(scope="session")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` without dropout."""
    sizes = {"hidden_size": 32, "intermediate_size": 43, "num_hidden_layers": 2}
    return write_model(tmp_path_factory.mktemp("models") / "still", **sizes, dropout=0.0)


@pytest.fixture
def bert(tmp_path: Path) -> TrainConfig:
    """A classifier that learns from 61 sentences."""
    write_bert(tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    write_table(tmp_path / "train.tsv", ROWS[:61])
    write_table(tmp_path / "dev.tsv", ROWS[61:])
    config = tiny(tmp_path / "bert", tmp_path / "train.tsv", tmp_path / "run", max_steps=6)
    config.data = DataConfig(
        train=str(tmp_path / "train.tsv"), valid=str(tmp_path / "dev.tsv"), sequence_length=16, batch_size=4, bucket=0
    )
    return replace(config, task="classification", distill=DistillConfig(ce=1.0, kl=0.0))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts `qat.train` with arguments, plain or by torchrun."""
    started: list[Command] = []

    def begin(*arguments: str, torchrun: bool = False) -> Command:
        run = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", f"{free_port()}", "-m"] if torchrun else []
        started.append(Command([sys.executable, "-m", *run, "qat.train", *arguments], tmp_path))
        return started[-1]

    yield begin
    for command in started:
        command.close()


@pytest.fixture
def settings(still: Path, text_file: Path) -> list[str]:
    values = {
        "recipe": "plain", "model.path": still, "data.train": text_file, "data.sequence_length": 32, "data.batch_size": 4,
        "data.valid_fraction": 0.1, "optim.lr": 5e-3, "trainer.max_steps": 6, "trainer.log_every_n_steps": 1,
        "trainer.threads": 1, "trainer.accelerator": "cpu", "export.formats": "[hf]", "trainer.val_every": 3,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]
