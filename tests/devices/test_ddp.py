"""Two ranks train as one process that accumulates their batches: weights, moments and everything measured, to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import write_chat_model
from devices.pair import Pair
from several import alone, assert_equal, assert_same_training, both, rows, stopped, tiny

from qat import parallel
from qat.config import DataConfig, DistillConfig, OptimConfig, RunConfig, SelfgenConfig, TrainConfig
from qat.training.run import run


def test_equal_to_accumulation(pair: Pair, still: Path, text_file: Path, tmp_path: Path):
    config = tiny(still, text_file, tmp_path / "run")
    two, one = both(pair, config), alone(config)
    assert_same_training(one, two)
    assert len(rows(two)) == 10 + 4 and (two / "packed").is_dir() and (two / "report.html").exists()
    assert sorted(file.name for file in (two / "checkpoints").iterdir()) == ["last.ckpt"]


@pytest.mark.parametrize("trainer", [{"precision": "bf16-mixed"}, {"activation_checkpointing": True}], ids=lambda one: [*one][0])
def test_equal_in_other_settings(pair: Pair, still: Path, text_file: Path, tmp_path: Path, trainer: dict[str, Any]):
    config = tiny(still, text_file, tmp_path / "run", **{**trainer, "max_steps": 8})
    assert_same_training(alone(config), both(pair, config))


def test_damping_balance_and_thresholds(pair: Pair, still: Path, text_file: Path, tmp_path: Path):
    config = tiny(still, text_file, tmp_path / "run", max_steps=8)
    config.distill = DistillConfig(ce=0.5, kl=0.5, balance=2)
    config.optim = OptimConfig(lr=5e-3, damping=1e-3, freeze_oscillation=0.2, oscillation_every=1)
    assert_same_training(alone(config), both(pair, config))


def test_text_that_the_model_writes(pair: Pair, still: Path, tmp_path: Path):
    config = tiny(still, Path("unused"), tmp_path / "run", max_steps=4)
    selfgen = SelfgenConfig(tokens=32 * 25, valid_tokens=32 * 6, batch_size=4)
    config.data = DataConfig(kind="selfgen", sequence_length=32, batch_size=2, selfgen=selfgen, cache_dir=str(tmp_path / "two"))
    two = both(pair, config)
    assert len(list((tmp_path / "two").glob("*.bin"))) == 2
    config.data = replace(config.data, cache_dir=str(tmp_path / "one"))
    one = alone(config)
    assert {file.read_bytes() for file in (tmp_path / "one").glob("*.bin")} == {
        file.read_bytes() for file in (tmp_path / "two").glob("*.bin")
    }
    assert_same_training(one, two)


def test_classifier(pair: Pair, bert: TrainConfig):
    assert_same_training(alone(bert), both(pair, bert))


@pytest.fixture
def chats(still: Path, tmp_path: Path) -> TrainConfig:
    """Answers of 4 and of 40 letters, and few of the long ones."""
    write_chat_model(still, tmp_path / "model")
    answers = ["yes." * (1 if i % 4 else 10) for i in range(30)]
    texts = [[{"role": "user", "content": "say"}, {"role": "assistant", "content": answer}] for answer in answers]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": text}) for text in texts))
    config = tiny(tmp_path / "model", tmp_path / "chats.jsonl", tmp_path / "run", max_steps=6, log_every_n_steps=1)
    config.data = DataConfig(
        kind="chat", train=str(tmp_path / "chats.jsonl"), sequence_length=60, valid_fraction=0.4, batch_size=1
    )
    return config


def test_unequal_token_counts(pair: Pair, chats: TrainConfig):
    """A mean of the ranks' means would weigh a token of a short chat ten times as much."""
    two, one = both(pair, chats), alone(chats)
    assert_same_training(one, two)
    whole = replace(chats, run=RunConfig(name="whole", dir=f"{chats.run.dir}-whole"), data=replace(chats.data, batch_size=2))
    run(whole)
    first = [float(rows(folder)[0]["train/loss"]) for folder in (two, Path(str(whole.run.dir)))]
    assert abs(first[0] - first[1]) < 1e-6


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 2])
def test_resume_on_other_devices(pair: Pair, still: Path, text_file: Path, tmp_path: Path, before: int, after: int):
    if before == after == 1:
        return
    config = tiny(still, text_file, tmp_path / "run", max_steps=12, log_every_n_steps=1)
    whole = alone(config)
    folder = tmp_path / "run"
    if before == 2:
        status = f"interrupted at step 7; continue with resume={folder}"
        assert pair(stopped, replace(config, trainer=replace(config.trainer, devices=2)), 7, seconds=300) == [status] * 2
    else:
        stopped(replace(config, trainer=replace(config.trainer, accumulate_grad_batches=2)), 7)
    resumed = replace(config, resume=str(folder))
    if after == 2:
        both(pair, resumed)
    else:
        run(replace(resumed, trainer=replace(config.trainer, accumulate_grad_batches=2)))
    first, second = (torch.load(one / "checkpoints/last.ckpt", weights_only=True) for one in (whole, folder))
    assert first["global_step"] == second["global_step"] == 12
    assert_equal(first["state_dict"], second["state_dict"])
    assert_equal(first["optimizer_states"][0]["state"], second["optimizer_states"][0]["state"])


def _draws(config: TrainConfig) -> list[float]:
    """What a rank draws where its training ends."""
    run(config)
    return [float(torch.rand(())), parallel.rank()]


def test_ranks_draw_other_numbers_and_go_on_with_them(pair: Pair, tiny_model: Path, text_file: Path, tmp_path: Path):
    config = tiny(tiny_model, text_file, tmp_path / "whole", max_steps=4, devices=2)
    drawn = pair(_draws, config, seconds=300)
    assert drawn[0][0] != drawn[1][0]
    part = replace(config, run=replace(config.run, dir=str(tmp_path / "part")))
    pair(stopped, part, 2, seconds=300)
    assert pair(_draws, replace(part, resume=str(tmp_path / "part")), seconds=300) == drawn
