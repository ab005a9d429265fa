"""The run that several files train, change and end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chats import write_chat_model
from tiny_run import TRAINER

from qat.config import DataConfig, DistillConfig, ExportConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, TrainerConfig


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


@pytest.fixture
def chats(tiny_model: Path, tmp_path: Path) -> TrainConfig:
    """Chats of very different lengths, one step of plain gradient descent, so that the weights tell the gradient."""
    write_chat_model(tiny_model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))
    answers = ["yes." * (1 if i % 4 else 10) for i in range(20)]
    rows = [[{"role": "user", "content": "say"}, {"role": "assistant", "content": answer}] for answer in answers]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    return TrainConfig(
        model=ModelConfig(path=str(tmp_path / "model")),
        data=DataConfig(kind="chat", train=str(tmp_path / "chats.jsonl"), sequence_length=60, valid_fraction=0.4),
        distill=DistillConfig(ce=0.5, kl=0.5),
        optim=OptimConfig(lr=0.02, optimizer={"_target_": "torch.optim.SGD"}),
        trainer=TrainerConfig(max_steps=1, accelerator="cpu", progress=False, threads=1, val_every=1, gradient_clip_val=0.5),
        export=ExportConfig(formats=[]),
        run=RunConfig(name="chats"),
    )
