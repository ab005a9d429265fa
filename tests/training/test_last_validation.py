"""The last step of a run is validated once, whatever the interval, and callbacks and the checkpoint see it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_run import killed_and_resumed, stop_after

from qat.config import TrainConfig
from qat.config.compose.saved import load_config
from qat.train import run
from qat.training.callbacks.metrics_file import read_rows


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    config.trainer = replace(config.trainer, max_steps=5, val_every=2, val_batches=1, samples=0, monitor_every=None)
    return config


def validated(folder: Path) -> list[int]:
    return [int(row["step"]) for row in read_rows(folder / "metrics.csv")[0] if "val/ce" in row]


def states(folder: Path, name: str) -> dict[str, Any]:
    found = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["callbacks"]
    return next(value for key, value in found.items() if key.startswith(name))


def early(patience: int) -> dict[str, Any]:
    target = "lightning.pytorch.callbacks.EarlyStopping"
    return {"es": {"_target_": target, "monitor": "val/ce", "patience": patience, "min_delta": 5}}


@pytest.mark.parametrize(("steps", "every", "accumulate", "expected"), [
    (5, 2, 1, [2, 4, 5]), (4, 2, 1, [2, 4]), (5, 3, 3, [3, 5]), (1, 2, 2, [1]), (3, 9, 2, [3]), (3, None, 1, []),
])  # fmt: skip
def test_the_last_step_is_validated_once(
    config: TrainConfig, steps: int, every: int | None, accumulate: int, expected: list[int]
) -> None:
    config.trainer = replace(config.trainer, max_steps=steps, val_every=every, accumulate_grad_batches=accumulate)
    result = run(config)
    assert validated(Path(result.folder)) == expected and result.status == "done"


@pytest.mark.parametrize("step", [3, 5])
def test_a_run_that_was_killed_has_it_too(config: TrainConfig, tmp_path: Path, step: int) -> None:
    config.trainer = replace(config.trainer, accumulate_grad_batches=2)
    config.callbacks = early(patience=9)
    folder = killed_and_resumed(config, tmp_path / "parts", step, checkpoint_every=1)
    assert validated(folder) == [2, 4, 5]
    assert states(folder, "EarlyStopping")["wait_count"] == 2  # each validation but the first, the last one, too


def test_a_run_that_died_behind_it_does_not_repeat_it_and_goes_on_from_it(config: TrainConfig, monkeypatch: Any) -> None:
    def dies(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("qat.training.run.finish", dies)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(config)
    folder = Path(str(config.run.dir))
    assert run(load_config(str(folder))).status == "done" and validated(folder) == [2, 4, 5]
    run(load_config(str(folder), ["trainer.max_steps=7"]))
    assert validated(folder) == [2, 4, 5, 6, 7]


def test_early_stopping_sees_it_in_time(config: TrainConfig) -> None:
    config.callbacks = early(patience=2)
    result = run(config)
    assert result.status == "done"  # asked to stop at the last step, which ends the run anyway
    assert states(Path(result.folder), "EarlyStopping")["stopped_epoch"] == 0
    assert states(Path(result.folder), "EarlyStopping")["wait_count"] == 2


def test_a_stop_between_validations_leaves_a_checkpoint_that_knows_the_last_one(config: TrainConfig) -> None:
    config.trainer = replace(config.trainer, max_steps=9, val_every=4)
    config.callbacks = {**early(patience=9), "stop": {"_target_": "test_last_validation.Stops", "step": 6}}
    result = run(config)
    assert result.status == "stopped at step 6 by Stops" and validated(Path(result.folder)) == [4, 6]
    assert states(Path(result.folder), "EarlyStopping")["wait_count"] == 1


class Stops(pl.Callback):
    """Asks for the end at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


def test_a_kill_in_the_last_validation_leaves_the_checkpoint_before(config: TrainConfig) -> None:
    config.trainer = replace(config.trainer, checkpoint_every=1)
    stop_after(config, 5)
    folder = Path(str(config.run.dir))
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
