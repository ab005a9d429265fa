"""Numbers of a training do not depend on how sequences were cut into batches; rows say what the step did."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import killed_and_resumed, losses

from qat.config import DataConfig, DistillConfig, RunConfig, TrainConfig
from qat.train import run


def trained(config: TrainConfig, folder: Path, batch: int, accumulate: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights after the run, and the last value of each column of metrics.csv."""
    config.data = replace(config.data, batch_size=batch)
    config.trainer = replace(config.trainer, accumulate_grad_batches=accumulate)
    config.run = RunConfig(name="chats", dir=str(folder))
    run(config)
    with (folder / "metrics.csv").open() as file:
        values = {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"], values


def test_eight_chats_at_once_or_one_by_one(chats: TrainConfig, tmp_path: Path) -> None:
    weights, values = trained(chats, tmp_path / "8x1", 8, 1)
    others, again = trained(chats, tmp_path / "1x8", 1, 8)
    shapes, threes = trained(replace(chats), tmp_path / "2x4", 2, 4)
    for name in ("train/loss", "train/ce", "train/kl", "val/ce", "val/kl", "val/loss"):
        assert again[name] == pytest.approx(values[name], rel=1e-6, abs=1e-8) == threes[name]
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(shapes[name], weight, rtol=1e-6, atol=1e-7)


def test_every_term_of_a_distillation_in_any_batches(chats: TrainConfig, tmp_path: Path) -> None:
    """Padding, masked words and chunks of the vocabulary's rows included."""
    chats.distill = DistillConfig(ce=0.5, kl=0.5, kl_chunk=7, hidden=0.5, cosine=0.5, relation=0.5)
    weights, values = trained(chats, tmp_path / "8x1", 8, 1)
    others, again = trained(chats, tmp_path / "1x8", 1, 8)
    for name in ("loss", "ce", "kl", "hidden", "cosine", "relation"):
        assert again[f"train/{name}"] == pytest.approx(values[f"train/{name}"], rel=1e-5) and values[f"train/{name}"] > 0
        assert again[f"val/{name}"] == pytest.approx(values[f"val/{name}"], rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-5, atol=1e-6)
    chats.distill = replace(chats.distill, kl_chunk=None)
    whole, plain = trained(chats, tmp_path / "whole", 8, 1)
    assert plain["train/kl"] == pytest.approx(values["train/kl"], rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(whole[name], weight, rtol=1e-5, atol=1e-6)


def test_text_in_whole_batches_is_the_plain_mean(chats: TrainConfig, text_file: Path, tmp_path: Path) -> None:
    """`train/loss` is the whole step's: it equals the mean of the accumulated batches' means where all are full."""
    chats.data = DataConfig(train=str(text_file), sequence_length=32, valid_fraction=0.1)
    _, values = trained(chats, tmp_path / "8x1", 8, 1)
    _, again = trained(chats, tmp_path / "2x4", 2, 4)
    assert again["train/loss"] == pytest.approx(values["train/loss"], rel=1e-6)
    assert again["train/ce"] == pytest.approx(values["train/ce"], rel=1e-6)


def test_a_row_is_the_mean_since_the_last_one(config: TrainConfig, tmp_path: Path) -> None:
    """To the bit also where the run died between two rows and went on from a checkpoint there; steps of text count equally."""
    each = losses(Path(run(config).folder))
    config.trainer = replace(config.trainer, log_every_n_steps=5)
    config.run = RunConfig(name="tiny", dir=str(tmp_path / "rows"))
    rows = losses(Path(run(config).folder))
    assert list(rows) == [5, 10]
    for row, value in rows.items():
        assert float(value) == pytest.approx(sum(float(each[row - i]) for i in range(5)) / 5, rel=1e-6)
    assert losses(killed_and_resumed(config, tmp_path / "parts", step=9, checkpoint_every=7)) == rows


def test_a_run_that_died_before_its_first_row_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    config.trainer = replace(config.trainer, log_every_n_steps=10)
    whole = losses(Path(run(config).folder))
    assert list(whole) == [10] and losses(killed_and_resumed(config, tmp_path / "parts", step=3, checkpoint_every=2)) == whole
