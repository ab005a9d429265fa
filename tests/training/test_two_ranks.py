"""A sample of tests/devices: two ranks train, in either strategy, as one process that accumulates, and fail as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from devices.pair import Pair
from devices.several import alone, assert_equal, both, performed, rows, tiny
from tiny import write_model

from qat import parallel
from qat.config import TrainConfig
from qat.training.module import QATModule

STEP = 3


@pytest.fixture
def config(text_file: Path, tmp_path: Path) -> TrainConfig:
    """Without dropout: ranks draw other random numbers than one process."""
    sizes = {"hidden_size": 32, "intermediate_size": 43, "num_hidden_layers": 2}
    model = write_model(tmp_path / "still", **sizes, dropout=0.0)
    return tiny(model, text_file, tmp_path / "run", max_steps=5, checkpoint_every=STEP, val_every=None, log_every_n_steps=1)


def on(strategy: str, config: TrainConfig) -> TrainConfig:
    """Each in a folder of its own."""
    folder = replace(config.run, dir=f"{config.run.dir}-{strategy}")
    return replace(config, trainer=replace(config.trainer, strategy=strategy, devices=2), run=folder)


def state(folder: Path) -> Any:
    found = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return {"weights": found["state_dict"], "moments": found["optimizer_states"][0]["state"], "step": found["global_step"]}


def test_one_training_three_ways(pair: Pair, config: TrainConfig) -> None:
    one = alone(config)
    for strategy in ("ddp", "fsdp2"):
        two = both(pair, on(strategy, config))
        assert_equal(state(one), state(two))
        assert [row["train/loss"] for row in rows(one)] == [row["train/loss"] for row in rows(two)]
        packed = "packed/model.safetensors"
        assert (one / packed).read_bytes() == (two / packed).read_bytes()
        assert sorted(file.name for file in two.iterdir()) == sorted(file.name for file in one.iterdir())


def broken(config: TrainConfig) -> Any:
    """The last rank's loss is NaN in the step after the checkpoint."""
    original = QATModule.training_step

    def step_of(self: QATModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = original(self, batch, batch_idx)
        return loss * float("nan") if parallel.rank() == 1 and self.global_step == STEP else loss

    QATModule.training_step = step_of  # type: ignore[method-assign]
    try:
        return performed(config)
    finally:
        QATModule.training_step = original  # type: ignore[method-assign]


def test_nan_on_one_rank_ends_both_and_another_strategy_goes_on(pair: Pair, config: TrainConfig) -> None:
    before, after = on("fsdp2", config), on("ddp", config)
    found = pair.failures(broken, before, seconds=300)
    said = f"NonFiniteError: the loss is nan at step {STEP + 1} on rank 1; first bad output: the loss."
    assert found[0] == found[1] and str(found[0]).startswith(said)
    folder = Path(str(before.run.dir))
    assert state(folder)["step"] == STEP
    assert_equal(state(both(pair, replace(after, run=before.run, resume=str(folder)))), state(alone(config)))
