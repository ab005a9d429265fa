"""What a run logs of itself: every name is in the table of metrics."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import TRAINER

from qat.config import DistillConfig, TrainConfig
from qat.monitor.table import find, result_metrics
from qat.train import run


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv, without empty cells."""
    with (folder / "metrics.csv").open() as lines:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(lines)]


def test_every_column_and_every_number_of_a_result_is_in_the_table(config: TrainConfig) -> None:
    config.distill = DistillConfig(ce=0.5, kl=0.5, hidden=1.0, balance=4)
    config.trainer = replace(TRAINER, max_steps=6, val_every=3, accumulate_grad_batches=2)
    result = run(config)
    found = rows_of(Path(result.folder))
    names = {name for row in found for name in row} | result_metrics(result.to_dict()).keys()
    assert {find(name).section for name in names} == {"", "train", "val", "optim", "speed", "result"}
    assert [row["tokens"] for row in found if "tokens" in row] == [2 * 4 * 32 * step for step in range(1, 7)]
    with pytest.raises(ValueError, match="is no metric"):
        find("lr-AdamW")
