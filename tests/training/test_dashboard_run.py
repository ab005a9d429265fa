"""What the dashboards draw is what a run logs: one whole run, killed and gone on with, is read back by W&B's own reader."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from test_loggers import merged, records
from tiny_run import overrides, started

from qat.config import TrainConfig
from qat.config.compose.saved import load_config
from qat.monitor.table import HEALTH, SECTIONS
from qat.reporting.dashboard import metrics, patterns
from qat.train import run
from qat.training.monitoring import speed

SPEC = json.loads((Path(__file__).resolve().parents[2] / "docs" / "dashboard.json").read_text())
EVERYTHING = {
    "logger": "wandb",
    "distill.ce": 0.3,
    "distill.kl": 0.3,
    "distill.hidden": 1.0,
    "optim.anneal": "soft",
    "trainer.max_steps": 80,
    "trainer.monitor_every": 5,
    "trainer.val_every": 20,
    "trainer.checkpoint_every": 10,
}
"""A teacher, several losses, soft codes, validations and looks."""


@pytest.fixture
def parts(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """The offline folders of a run that was killed and continued, as records."""
    pytest.importorskip("wandb")
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(speed, "_peak_flops", lambda *_: 1e12)  # a CPU's is not known
    folder = tmp_path / "whole"
    process = started(overrides(config, folder, **EVERYTHING), folder / "checkpoints/last.ckpt")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    run(load_config(str(folder)))
    return [records(one) for one in sorted(folder.glob("wandb/offline-run-*"))]


def test_all_that_the_dashboards_draw_is_in_a_run_that_was_killed_and_went_on(parts: list[list[dict[str, Any]]]) -> None:
    before, after = ([one["history"]["item"] for one in part if one["type"] == "history"] for part in parts)
    ids = {one["run"]["run_id"] for part in parts for one in part if one["type"] == "run"}
    steps = [[row["step"] for row in rows if "train/loss" in row] for rows in (before, after)]
    assert len(ids) == 1 and steps[0] == list(range(1, len(steps[0]) + 1)) and steps[1] == list(range(steps[1][0], 81))
    told, summary = merged(parts[0], "config"), merged(parts[1], "summary")
    assert told["distill"]["hidden"] == 1.0 and told["about"]["commit"] and told["about"]["command"]
    logged = {name for row in (*before, *after) for name in row} | summary.keys()
    drawn = metrics(SPEC) - {"_step"}
    assert len(drawn) > 30 and drawn - logged == set()
    assert [one for one in patterns(SPEC) if not any(re.fullmatch(one, name) for name in logged)] == []
    assert {f"quant/{family}/{name}" for family in ("q", "down") for name in HEALTH} <= logged
    assert {name.partition("/")[0] for name in logged} >= set(SECTIONS)
