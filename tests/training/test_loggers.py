"""Trackers: what reaches them from a real run, read back with their own readers; one run stays one over a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import stop_after
from torch import nn

from qat.config import TrainConfig
from qat.config.compose.saved import load_config, save_config
from qat.monitor.histograms import latent_histograms
from qat.monitor.table import find
from qat.nn.bitlinear import BitLinear
from qat.train import run

WANDB = {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "qat", "offline": True}


def records(folder: Path) -> list[dict[str, Any]]:
    """A run's log by the official reader, which needs no key."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def merged(found: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return {key: value for one in found if one["type"] == kind for key, value in one[kind]["update"].items()}


def test_a_wandb_run_holds_config_sections_and_result_and_goes_on_after_a_kill(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config.logger = {"wandb": {**WANDB, "artifact": True}}
    config.run.group, config.run.tags, config.run.job = "sweep", ["small"], "optim.lr=5e-3"
    config.trainer.checkpoint_every, config.trainer.val_every, config.trainer.max_steps = 4, 3, 8
    folder = Path(config.run.dir or "")
    stop_after(config, 6)
    result = run(load_config(str(folder)))
    first, second = (records(one) for one in sorted(folder.glob("wandb/offline-run-*")))
    of_run = [next(one["run"] for one in part if one["type"] == "run") for part in (first, second)]
    assert of_run[0]["run_id"] == of_run[1]["run_id"]  # which is what `wandb sync` joins parts by
    assert of_run[1]["run_group"] == "sweep" and of_run[1]["tags"] == ["small"] and of_run[1]["job_type"] == "train"
    told = merged(second, "config")
    assert told["optim"]["lr"] == 5e-3 and told["about"]["versions"]["torch"] and told["about"]["model"]["parameters"] > 0
    rows = [one["history"]["item"] for one in second if one["type"] == "history"]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(steps) and [row["step"] for row in rows if "train/loss" in row] == [5, 6, 7, 8]
    names = {key for part in (first, second) for one in part if one["type"] == "history" for key in one["history"]["item"]}
    assert {"train/loss", "val/ce", "result/table._type"} <= names and any(key.startswith("latents/") for key in names)
    summary = merged(second, "summary")
    assert summary["result/perplexity/trained"] == result.perplexity["trained"]
    assert summary["result/status"] == "done" and summary["result/bytes/packed_model"] == result.bytes["packed_model"]
    assert [find(key) for key in summary if key.startswith("result/") and not key.startswith("result/table")]
    artifacts = {one["artifact"]["type"]: one["artifact"] for one in second if one["type"] == "artifact"}
    assert "packed_max_logit_difference" in json.dumps(artifacts["model"])
    axes = [one["metric"] for one in second if one["type"] == "metric"]
    assert axes[-1] == {"glob_name": "*", "options": {"defined": True, "step_sync": True}, "step_metric": "step"}


def test_offline_holds_where_wandb_was_set_up_online_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a dashboard's specification or a check of the key does, in the same process."""
    wandb = pytest.importorskip("wandb")
    from qat.training.loggers.weights_and_biases import Wandb

    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.setup()
    logger = Wandb(project="qat", offline=True, save_dir=str(tmp_path))
    assert logger.experiment.offline
    logger.experiment.finish()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_a_failed_run_reaches_its_trackers(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config.logger, config.trainer.max_steps, config.optim.lr = {"wandb": WANDB}, 4, 1e30
    with pytest.raises(ValueError, match="loss is nan"):
        run(config)
    (part,) = Path(config.run.dir or "").glob("wandb/offline-run-*")
    found = records(part)
    assert merged(found, "summary")["result/status"].startswith("failed")
    assert next(one["exit"] for one in found if one["type"] == "exit")["exit_code"] == 1


def test_without_a_key_live_logging_is_refused_before_anything_is_loaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    config.logger, config.model.path = {"mine": {**WANDB, "offline": False}}, str(tmp_path / "no_model")
    with pytest.raises(ValueError, match=r"logger\.mine\.offline=false needs a key"):
        run(config)


def test_tensorboard_has_a_layout_histograms_and_the_result(config: TrainConfig) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    target = "lightning.pytorch.loggers.TensorBoardLogger"
    config.logger, config.trainer.max_steps = {"tb": {"_target_": target, "name": "", "version": "tensorboard"}}, 2
    result = run(config)
    found = EventAccumulator(str(Path(config.run.dir or "") / "tensorboard"), size_guidance={"histograms": 0})
    found.Reload()
    tags = found.Tags()
    assert "custom_scalars__config__" in tags["tensors"] and "train/loss" in tags["scalars"]
    (value,) = found.Scalars("result/perplexity/trained")
    assert value.value == pytest.approx(result.perplexity["trained"]) and value.step == 2
    assert [one.step for one in found.Histograms("latents/q")] == [0, 2]


def test_histograms_have_the_families_of_every_other_number() -> None:
    def block() -> nn.Module:
        attention, mlp = (
            nn.ModuleDict({"dense": BitLinear(8, 4)}),
            nn.ModuleDict({"dense": BitLinear(8, 2), "up_proj": BitLinear(8, 1)}),
        )
        return nn.ModuleDict({"attn": attention, "mlp": mlp})

    found = latent_histograms(nn.ModuleList([block(), block()]))
    assert {name: int(one.counts.sum()) for name, one in found.items()} == {"attn.dense": 64, "mlp.dense": 32, "up": 16}


def test_mlflow_continues_its_run(config: TrainConfig, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    target = "lightning.pytorch.loggers.MLFlowLogger"
    config.logger, config.trainer.max_steps = {"m": {"_target_": target, "experiment_name": "qat", "tracking_uri": store}}, 2
    run(config)
    result = run(load_config(config.run.dir or "", ["trainer.max_steps=3"]))
    client = mlflow.tracking.MlflowClient(store)
    (only,) = client.search_runs([client.get_experiment_by_name("qat").experiment_id])
    assert [one.step for one in client.get_metric_history(only.info.run_id, "train/loss")] == [1, 2, 3]
    assert only.data.metrics["result/perplexity/trained"] == result.perplexity["trained"]
    assert only.data.params["optim/lr"] == "0.005" and only.data.tags["status"] == "done"
    assert only.data.tags["resumed.trainer.max_steps"] == "3" and not [key for key in only.data.tags if "optim" in key]


def test_trackio_continues_its_run(config: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    config.logger, config.trainer.max_steps = {"t": {"_target_": "qat.training.loggers.TrackioLogger", "group": "g"}}, 2
    asked = tmp_path / "asked"
    asked.mkdir()
    save_config(config, asked)
    script = (
        "import json, sys\n"
        "from qat.config.compose.saved import load_config\n"
        "from qat.train import run\n"
        f"config = load_config({str(asked)!r}); config.resume = None; run(config)\n"
        f"run(load_config({config.run.dir!r}, ['trainer.max_steps=3']))\n"
        "import trackio\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "(only,) = trackio.Api().runs('qat')\n"
        "rows = SQLiteStorage.get_logs('qat', only.name)\n"
        "found = [only.config['_Group'], [row['step'] for row in rows if 'train/loss' in row], list(rows[-1])]\n"
        "print('\\n' + json.dumps(found))\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    group, steps, last = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('["g')))
    assert group == "g" and steps == [1, 2, 3] and "result/perplexity/trained" in last
