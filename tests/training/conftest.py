"""The run that several files train, change and end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import TRAINER

from qat.config import DataConfig, DistillConfig, ExportConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig


@pytest.fixture
def config(tiny_model: Path, text_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=str(tiny_model)),
        data=DataConfig(train=str(text_file), sequence_length=32, batch_size=4, valid_fraction=0.1),
        distill=DistillConfig(ce=0.5, kl=0.5),
        optim=OptimConfig(lr=5e-3, warmup_steps=2),
        trainer=replace(TRAINER),
        export=ExportConfig(formats=[]),
        run=RunConfig(name="tiny", dir=str(tmp_path / "run")),
    )
