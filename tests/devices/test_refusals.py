"""What cannot work with several ranks ends on all of them, with one reason, and leaves nobody waiting."""

from __future__ import annotations

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
from qat.training.callbacks import NonFiniteGuard
from qat.training.module import QATModule


def _different(config: TrainConfig, other: TrainConfig) -> Any:
    return performed(config if parallel.first() else other)


@pytest.fixture
def config(tiny_model: Path, text_file: Path, tmp_path: Path) -> TrainConfig:
    return tiny(tiny_model, text_file, tmp_path / "run", devices=2, max_steps=6, val_every=None)


def test_other_configurations(pair: Pair, config: TrainConfig):
    other = replace(config, trainer=replace(config.trainer, max_steps=7))
    said = "ValueError: the processes of this run differ in trainer.max_steps: rank 0 has 6, rank 1 7"
    assert pair.failures(_different, config, other, seconds=200) == [said] * 2
    assert not Path(str(config.run.dir)).exists()


def test_other_folders_are_one_run(pair: Pair, config: TrainConfig, tmp_path: Path):
    other = replace(config, run=replace(config.run, dir=str(tmp_path / "late")))
    assert pair(_different, config, other, seconds=120) == [("done", None)] * 2
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
    found = pair.failures(_other_file, config, str(tmp_path / "text"), [str(text_file), str(longer)], seconds=120)
    assert found[0] == found[1] and "have different training or validation texts" in str(found[0])


def test_a_file_that_one_rank_lacks(pair: Pair, config: TrainConfig, text_file: Path, tmp_path: Path):
    found = pair.failures(_other_file, config, str(tmp_path / "text"), [str(text_file), str(tmp_path / "no")], seconds=120)
    assert "no such file or data set" in str(found[1]) or "does not exist" in str(found[1]) or "text1" in str(found[1])
    assert str(found[0]).startswith("ValueError: rank 1 of 2: ")


def _not_finite(config: TrainConfig, where: int, step: int) -> Any:
    """The loss of one rank becomes NaN at a step, by an output of one of its layers."""
    original = QATModule.training_step

    def step_of(self: QATModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = original(self, batch, batch_idx)
        return loss * float("nan") if parallel.rank() == where and self.global_step == step - 1 else loss

    QATModule.training_step = step_of  # type: ignore[method-assign]
    try:
        return performed(config)
    finally:
        QATModule.training_step = original  # type: ignore[method-assign]


@pytest.mark.parametrize("where", [0, 1])
def test_nan_on_one_rank(pair: Pair, config: TrainConfig, where: int):
    config.trainer = replace(config.trainer, checkpoint_every=2)
    found = pair.failures(_not_finite, config, where, 4, seconds=120)
    assert found[0] == found[1]
    assert str(found[0]).startswith(f"NonFiniteError: the loss is nan at step 4 on rank {where}; first bad output: the loss.")
    kept = torch.load(Path(str(config.run.dir)) / "checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert NonFiniteGuard is not None


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_one_step(pair: Pair, config: TrainConfig, where: int, number: int):
    found = pair(_signalled, config, where, int(number), seconds=120)
    assert found == [(f"interrupted at step 3; continue with resume={config.run.dir}", number)] * 2
    assert torch.load(Path(str(config.run.dir)) / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
