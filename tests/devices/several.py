"""Runs on two ranks, and what is compared of their folders."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qat import parallel
from qat.config import DataConfig, DistillConfig, ExportConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, TrainerConfig
from qat.training.module import QATModule
from qat.training.run import run

TRAINER = TrainerConfig(
    max_steps=20, accelerator="cpu", progress=False, log_every_n_steps=2, threads=1, val_every=5, val_batches=3,
    checkpoint_minutes=None, monitor_every=10,
)  # fmt: skip
MEASURED_HERE = ("speed/",)
"""Columns that tell of the machine, not of the training."""


def tiny(model: Path, text: Path, folder: Path, **trainer: Any) -> TrainConfig:
    """A run with a teacher and clipping."""
    return TrainConfig(
        model=ModelConfig(path=str(model)),
        data=DataConfig(train=str(text), sequence_length=32, batch_size=4, valid_fraction=0.1),
        distill=DistillConfig(ce=0.5, kl=0.5),
        optim=OptimConfig(lr=5e-3, warmup_steps=2),
        trainer=replace(TRAINER, gradient_clip_val=0.5, **trainer),
        export=ExportConfig(formats=[]),
        run=RunConfig(name="tiny", dir=str(folder)),
    )


def alone(config: TrainConfig, accumulate: int = 2) -> Path:
    """The folder of the run of one process that accumulates what two would do at once."""
    folder = Path(f"{config.run.dir}-alone")
    config = replace(config, run=replace(config.run, dir=str(folder)))
    run(replace(config, trainer=replace(config.trainer, accumulate_grad_batches=accumulate, devices=1)))
    return folder


def performed(config: TrainConfig) -> tuple[str, int | None]:
    """On each rank: the status and signal of the run."""
    result = run(config)
    return result.status, result.signal


def stopped(config: TrainConfig, step: int) -> str:
    """On each rank: the status of a run in which a signal comes to the last rank while it trains the step."""
    original = QATModule.training_step

    def step_of(self: QATModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if parallel.rank() == parallel.size() - 1 and self.global_step == step - 1 and self._trainer is not None:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    QATModule.training_step = step_of  # type: ignore[method-assign]
    try:
        return run(config).status
    finally:
        QATModule.training_step = original  # type: ignore[method-assign]


def both(pair: Any, config: TrainConfig) -> Path:
    """The folder of the run of two ranks."""
    config = replace(config, trainer=replace(config.trainer, devices=2))
    assert pair(performed, config, seconds=300) == [("done", None)] * 2
    return Path(str(config.run.dir))


def assert_same_training(one: Path, other: Path) -> None:
    """Weights, moments, metrics, layers and measures are equal to the bit."""
    first, second = (torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (one, other))
    assert first["global_step"] == second["global_step"]
    assert_equal(first["state_dict"], second["state_dict"])
    assert_equal(first["optimizer_states"][0]["state"], second["optimizer_states"][0]["state"])
    for ours, theirs in zip(rows(one), rows(other), strict=True):
        assert ours == theirs
    for file in ("layers.arrow", "samples.md", "samples.json"):
        assert (one / file).exists() == (other / file).exists()
        assert not (one / file).exists() or (one / file).read_bytes() == (other / file).read_bytes(), file
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for key in ("perplexity", "further", "accuracy", "f1", "tokens", "conversion", "bytes"):
        assert results[0].get(key) == results[1].get(key), key
    assert [one["verification"]["packed_max_logit_difference"] for one in results] == [0.0, 0.0]


def assert_equal(one: Any, other: Any) -> None:
    """Trees of tensors."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv as text, without what the machine decides."""
    with (folder / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if not key.startswith(MEASURED_HERE)} for row in csv.DictReader(file)]
