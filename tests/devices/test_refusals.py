"""What cannot work with several ranks ends on all of them, with one reason, and leaves nobody waiting."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from devices.pair import Pair
from several import performed, tiny

from qat import parallel
from qat.config import DataConfig, TrainConfig
from qat.training.module import QATModule

ENDED = 300.0
"""Seconds for a run of a few steps, on a machine that is busy."""


def _different(config: TrainConfig, other: TrainConfig) -> Any:
    return performed(config if parallel.first() else other)


@pytest.fixture
def config(tiny_model: Path, text_file: Path, tmp_path: Path) -> TrainConfig:
    return tiny(tiny_model, text_file, tmp_path / "run", devices=2, max_steps=6, val_every=None)


def test_other_configurations(pair: Pair, config: TrainConfig):
    other = replace(config, trainer=replace(config.trainer, max_steps=7))
    said = "ValueError: the processes of this run differ in trainer.max_steps: rank 0 has 6, rank 1 7"
    assert pair.failures(_different, config, other, seconds=ENDED) == [said] * 2
    assert not Path(str(config.run.dir)).exists()


def test_other_folders_are_one_run(pair: Pair, config: TrainConfig, tmp_path: Path):
    other = replace(config, run=replace(config.run, dir=str(tmp_path / "late")))
    assert pair(_different, config, other, seconds=ENDED) == [("done", None)] * 2
    assert (tmp_path / "run/result.json").exists() and not (tmp_path / "late").exists()


def _other_file(config: TrainConfig, link: str, files: list[str]) -> Any:
    """Under one name, as on the disks of two machines."""
    name = Path(f"{link}{parallel.rank()}.txt")
    name.symlink_to(files[parallel.rank()])
    original = DataConfig.__getattribute__
    DataConfig.__getattribute__ = lambda self, key: str(name) if key == "train" and _reads() else original(self, key)  # type: ignore
    try:
        return performed(config)
    finally:
        DataConfig.__getattribute__ = original  # type: ignore[method-assign]


def _reads() -> bool:
    import inspect

    return any(frame.function == "open_data" for frame in inspect.stack()[:12])


def test_other_texts(pair: Pair, config: TrainConfig, text_file: Path, tmp_path: Path):
    longer = tmp_path / "longer.txt"
    longer.write_text(text_file.read_text().replace("cat", "dog"))
    found = pair.failures(_other_file, config, str(tmp_path / "text"), [str(text_file), str(longer)], seconds=ENDED)
    assert found[0] == found[1] and "have different training or validation texts" in str(found[0])


def test_a_file_that_one_rank_lacks(pair: Pair, config: TrainConfig, text_file: Path, tmp_path: Path):
    found = pair.failures(_other_file, config, str(tmp_path / "text"), [str(text_file), str(tmp_path / "no")], seconds=ENDED)
    assert "no such file or data set" in str(found[1]) or "does not exist" in str(found[1]) or "text1" in str(found[1])
    assert str(found[0]).startswith("ValueError: rank 1 of 2: ")


LAYER = "model.layers.1.mlp.down_proj"


def _not_finite(config: TrainConfig, where: int, step: int) -> Any:
    """A layer of one rank gives NaN at a step."""
    original = QATModule.on_train_start

    def on_train_start(self: QATModule) -> None:
        original(self)
        self.student.get_submodule(LAYER).register_forward_hook(
            lambda module, args, output: output * float("nan") if self.global_step == step - 1 else None
        )

    if parallel.rank() == where:
        QATModule.on_train_start = on_train_start  # type: ignore[method-assign]
    try:
        return performed(config)
    finally:
        QATModule.on_train_start = original  # type: ignore[method-assign]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_on_one_rank(pair: Pair, config: TrainConfig, where: int, strategy: str):
    config.trainer = replace(config.trainer, checkpoint_every=2, strategy=strategy)
    found = pair.failures(_not_finite, config, where, 4, seconds=ENDED)
    assert found[0] == found[1]
    assert str(found[0]).startswith(f"NonFiniteError: the loss is nan at step 4 on rank {where}; first bad output: {LAYER}.")
    kept = torch.load(Path(str(config.run.dir)) / "checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    status = json.loads((Path(str(config.run.dir)) / "result.json").read_text())["status"]
    assert status.startswith(f"failed: the loss is nan at step 4 on rank {where}")


def _signalled(config: TrainConfig, where: int, number: int) -> Any:
    """One rank gets a signal in the middle of step 3."""
    original = QATModule.training_step

    def step_of(self: QATModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if parallel.rank() == where and self.global_step == 2:
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    QATModule.training_step = step_of  # type: ignore[method-assign]
    try:
        return performed(config)
    finally:
        QATModule.training_step = original  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("strategy", "where", "number"),
    [
        ("ddp", 0, signal.SIGINT),
        ("ddp", 1, signal.SIGTERM),
        ("ddp", 1, signal.SIGINT),
        ("fsdp2", 0, signal.SIGTERM),
        ("fsdp2", 1, signal.SIGINT),
    ],
)
def test_a_signal_to_one_rank_stops_all_at_one_step(pair: Pair, config: TrainConfig, strategy: str, where: int, number: int):
    config.trainer = replace(config.trainer, strategy=strategy)
    found = pair(_signalled, config, where, int(number), seconds=ENDED)
    assert found == [(f"interrupted at step 3; continue with resume={config.run.dir}", number)] * 2
    assert torch.load(Path(str(config.run.dir)) / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
