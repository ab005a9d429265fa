"""`trainer.gradient_sums=float64`: to the bit one training, however many devices and batches share an update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from devices.pair import Pair
from several import assert_equal, both, performed, tiny

from qat.config import DistillConfig, OptimConfig, TrainConfig
from qat.training.run import run


def state(folder: Path) -> Any:
    found = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return {"weights": found["state_dict"], "moments": found["optimizer_states"][0]["state"]}


@pytest.fixture
def config(still: Path, text_file: Path, tmp_path: Path) -> TrainConfig:
    return tiny(still, text_file, tmp_path / "run", gradient_sums="float64", val_every=None, samples=0, monitor_every=None)


def by(config: TrainConfig, strategy: str, devices: int, batches: int) -> TrainConfig:
    folder = f"{config.run.dir}-{strategy}-{devices}"
    trainer = replace(config.trainer, strategy=strategy, devices=devices, accumulate_grad_batches=batches)
    return replace(config, trainer=trainer, run=replace(config.run, dir=folder))


def one_process(config: TrainConfig, batches: int) -> Path:
    alone = by(config, "auto", 1, batches)
    run(alone)
    return Path(str(alone.run.dir))


def test_two_batches_of_two_ranks_are_four_of_one_process(pair: Pair, config: TrainConfig) -> None:
    """20 steps, with a teacher and clipping."""
    alone = state(one_process(config, 4))
    for strategy in ("ddp", "fsdp2"):
        assert_equal(state(both(pair, by(config, strategy, 2, 2))), alone)


def test_weights_of_losses_too(pair: Pair, config: TrainConfig) -> None:
    """They are balanced by gradients of their own, in the middle of the sums."""
    config = replace(config, distill=DistillConfig(ce=0.5, kl=0.5, balance=2), optim=OptimConfig(lr=5e-3, damping=1e-3))
    config.trainer = replace(config.trainer, max_steps=5, precision="bf16-mixed")
    alone = state(one_process(config, 6))
    for strategy in ("ddp", "fsdp2"):
        assert_equal(state(both(pair, by(config, strategy, 2, 3))), alone)


@pytest.fixture(scope="module")
def three() -> Iterator[Pair]:
    found = Pair(3)
    yield found
    found.close()


@pytest.fixture(scope="module")
def alone(still: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("alone") / "run"
    quiet = {"val_every": None, "samples": 0, "monitor_every": None}
    return state(one_process(tiny(still, text_file, folder, gradient_sums="float64", max_steps=6, **quiet), 3))


def crowded(config: TrainConfig) -> tuple[str, int | None]:
    """On each rank of a machine that says it has a core for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 3)
        return performed(config)


@pytest.mark.parametrize("way", [{"strategy": "ddp"}, {"strategy": "fsdp2", "gather": "float32"}, {"strategy": "fsdp2"}])
def test_three_ranks_are_one_process(three: Pair, config: TrainConfig, alone: Any, way: dict[str, Any]) -> None:
    """Of 43 rows 15, 15 and 13."""
    config = by(config, way["strategy"], 3, 1)
    config.trainer = replace(config.trainer, max_steps=6, **way)
    assert three(crowded, config, seconds=300) == [("done", None)] * 3
    assert_equal(state(Path(str(config.run.dir))), alone)
