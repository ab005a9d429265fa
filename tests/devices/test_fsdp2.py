"""Runs whose model is sharded over two ranks are, to the bit, those of one process that accumulates their batches."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from devices.pair import Pair
from several import alone, assert_equal, both, rows, tiny
from torch.utils._pytree import tree_leaves

from qat.config import ControlConfig, DistillConfig, OptimConfig, TrainConfig
from qat.training.checkpoints import read_step
from qat.training.run import run


def state(folder: Path) -> tuple[Any, Any]:
    found = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return {"weights": found["state_dict"], "moments": found["optimizer_states"][0]["state"]}, found["callbacks"]


def assert_same(one: Path, other: Path) -> None:
    """Weights, moments, looks, texts and traces to the bit; norms that are summed in another order to 12 digits."""
    assert_equal(state(one)[0], state(other)[0])
    mine, theirs = (state(folder)[1] for folder in (one, other))
    for name in ("Monitor", "Oscillation"):
        assert_equal(*(dict(enumerate(tree_leaves(found.get(name)))) for found in (mine, theirs)))
    for file in ("layers.arrow", "samples.md", "samples.json"):
        assert (one / file).exists() == (other / file).exists()
        assert not (one / file).exists() or (one / file).read_bytes() == (other / file).read_bytes(), file
    for ours, others in zip(rows(one), rows(other), strict=True):
        assert ours.keys() == others.keys()
        for key in ours:
            assert ours[key] == others[key] or math.isclose(float(ours[key]), float(others[key]), rel_tol=1e-12), key


@pytest.fixture
def config(still: Path, text_file: Path, tmp_path: Path) -> TrainConfig:
    return tiny(still, text_file, tmp_path / "run", strategy="fsdp2")


def one_process(config: TrainConfig) -> Path:
    return alone(replace(config, trainer=replace(config.trainer, strategy="auto")))


def test_equal_to_accumulation(pair: Pair, config: TrainConfig) -> None:
    two, one = both(pair, config), one_process(config)
    assert_same(one, two)
    assert (two / "packed").is_dir() and sorted(file.name for file in (two / "checkpoints").iterdir()) == ["last.ckpt"]


@pytest.mark.parametrize("trainer", [{"precision": "bf16-mixed"}, {"activation_checkpointing": True}], ids=lambda one: [*one][0])
def test_equal_in_other_settings(pair: Pair, config: TrainConfig, trainer: dict[str, Any]) -> None:
    config.trainer = replace(config.trainer, max_steps=8, **trainer)
    assert_same(one_process(config), both(pair, config))


def test_what_looks_at_weights_and_moves_them(pair: Pair, config: TrainConfig) -> None:
    """Damping, freezing, balanced losses, looks, lambda, and a control that is trained as well."""
    config.trainer = replace(config.trainer, max_steps=8, monitor_every=2)
    config.distill = DistillConfig(ce=0.5, kl=0.5, balance=2)
    config.optim = OptimConfig(lr=2e-2, damping=1e-3, freeze_oscillation=0.005, oscillation_every=1, lambda_steps=3)
    config.control.enabled = True
    two, one = both(pair, config), one_process(config)
    assert_same(one, two)
    assert any(trace["frozen"].any() for trace in state(two)[1]["Oscillation"].values())
    assert_equal(state(one / "control")[0], state(two / "control")[0])


LOSSES = {
    "streams": {"ce": 0.5, "hidden": 0.5, "cosine": 0.5},
    "relations": {"ce": 0.5, "kl": 0.5, "relation": 1.0},
    "in chunks": {"ce": 0.5, "kl": 0.5, "kl_chunk": 8},
}  # fmt: skip


@pytest.mark.parametrize("losses", LOSSES)
def test_losses_that_listen_to_layers(pair: Pair, config: TrainConfig, losses: str) -> None:
    config.trainer = replace(config.trainer, max_steps=6)
    config.distill = DistillConfig(**LOSSES[losses])  # type: ignore[arg-type]
    assert_same(one_process(config), both(pair, config))


def test_classifier(pair: Pair, bert: TrainConfig) -> None:
    """Held to a teacher, which is trained first, by its answers and by its layers."""
    bert.trainer = replace(bert.trainer, strategy="fsdp2")
    bert.distill = DistillConfig(ce=0.5, kl=0.5, hidden=0.5)
    bert.control = ControlConfig(enabled=True, first=True)
    assert_same(one_process(bert), both(pair, bert))


STRATEGIES = {"one": 1, "ddp": 2, "fsdp2": 2}
TAKEN = {"log_every_n_steps": 1, "monitor_every": 2, "val_every": None, "max_steps": 12, "checkpoint_every": 7}


def on(strategy: str, config: TrainConfig) -> TrainConfig:
    devices = STRATEGIES[strategy]
    more = {"strategy": strategy if devices > 1 else "auto", "devices": devices, "accumulate_grad_batches": 2 // devices}
    return replace(config, trainer=replace(config.trainer, **{**TAKEN, **more}))


class Killed(BaseException):
    """As a kill: nothing catches it."""


class Kill(pl.Callback):
    """Behind the checkpoint of step 7."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 8:
            raise Killed


def killed(config: TrainConfig) -> None:
    with pytest.raises(Killed):
        run(replace(config, callbacks={"kill": {"_target_": f"{__name__}.Kill"}}))


@pytest.fixture(scope="module")
def whole(still: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(on("one", tiny(still, text_file, folder)))
    return state(folder)[0]


@pytest.fixture(scope="module", params=STRATEGIES)
def part(
    request: pytest.FixtureRequest, pair: Pair, still: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run that died behind step 7."""
    folder = tmp_path_factory.mktemp("part") / "run"
    config = on(request.param, tiny(still, text_file, folder))
    if config.trainer.devices == 1:
        killed(config)
    else:
        pair(killed, config, seconds=300)
    assert state(folder)[0]["moments"] and read_step(folder / "checkpoints/last.ckpt") == 7
    return folder


@pytest.mark.parametrize("after", STRATEGIES)
def test_resume_by_another_strategy(pair: Pair, config: TrainConfig, part: Path, whole: Any, after: str) -> None:
    """At an odd step; what one process accumulates in two batches is then on each of two."""
    folder = part.with_name(f"by-{after}")
    shutil.copytree(part, folder)
    resumed = replace(on(after, config), resume=str(folder), run=replace(config.run, dir=str(folder)))
    if resumed.trainer.devices == 1:
        run(resumed)
    else:
        both(pair, resumed)
    assert_equal(state(folder)[0], whole)
