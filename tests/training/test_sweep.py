"""Sweeps of real runs: names, comparison, what is done is skipped, Optuna and launchers, and what a W&B agent sends."""

from __future__ import annotations

import json
import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_loggers import merged, records
from tiny_run import ROOT, overrides

from qat import train
from qat.config import TrainConfig
from qat.config.compose.command import parse
from qat.config.compose.composing import compose_run
from qat.config.compose.saved import load_config
from qat.config.compose.text import as_typed
from qat.monitor.table import find
from qat.reporting.result import Perplexity, RunResult, read_result
from qat.training.sweeps.jobs import told
from qat.training.sweeps.outcomes import Outcome, noted


def code(arguments: list[str]) -> int:
    try:
        train.main(arguments)
    except SystemExit as error:
        assert isinstance(error.code, int)
        return error.code
    return 0


def test_a_sweep_compares_its_jobs_and_skips_what_is_done(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = {"quant.granularity": "tensor,channel", "optim.lr": "5e-3,1e-2", "trainer.max_steps": 1}
    asked = ["-m", *overrides(config, tmp_path / "sweep", **swept)]
    assert code(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.lstrip().startswith("job  ln(trained/full)"))
    values = [float(line.split()[1]) for line in lines[head + 1 : head + 5]]
    assert values == sorted(values) and "quant.granularity=channel" in " ".join(lines[head + 1 : head + 5])
    assert "Plotly" in (tmp_path / "sweep" / "comparison.html").read_text()
    third = load_config(str(tmp_path / "sweep" / "3"))
    assert third.run.group == str(tmp_path / "sweep") and "optim.lr=" in third.run.job and "granularity" in third.run.job
    unfinished = tmp_path / "sweep" / "2" / "result.json"
    unfinished.write_text(unfinished.read_text().replace('"status": "done"', '"status": "failed: a disk"'))
    assert code(asked) == 0
    said = capsys.readouterr().out
    assert [f"sweep/{n} is done and not run again" in said for n in range(4)] == [True, True, False, True]
    again = read_result(tmp_path / "sweep" / "2")
    assert again is not None and again.status == "done"


def test_optuna_minimises_the_log_ratio(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    found_in = {"hydra/sweeper": "qat_optuna", "hydra.sweeper.n_trials": 4, "hydra.sweep.dir": tmp_path / "study"}
    swept = {"trainer.max_steps": 2, **found_in}
    assert code(["-m", *overrides(config, tmp_path / "search", **swept)]) == 0
    best = yaml.safe_load((tmp_path / "study" / "optimization_results.yaml").read_text())
    results = [read_result(tmp_path / "search" / str(n)) for n in range(4)]
    found = [one.measured.recovered()["log_ratio_trained"] for one in results if one]
    assert best["best_value"] == pytest.approx(min(found)) and len(found) == 4
    said = capsys.readouterr().out
    assert "ln(trained/full)" in said and said.count("  done") == 4


def test_a_failed_job_of_a_search_is_named_and_ends_nothing(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = {"trainer.max_steps": "1,2", "optim.warmup_steps": 0, "optim.lr": "5e-3,1e30", "hydra/sweeper": "basic"}
    assert code(["-m", *overrides(config, tmp_path / "search", **swept)]) in (1, 2)
    outcomes = noted(str(tmp_path / "search"))
    assert [one.code for one in outcomes] == [0, 0, 2, 2]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("job 3  optim.lr=1e+30 trainer.max_steps=2  ") and "failed: optim.lr=1e+30 is not allowed" in last


def test_jobs_that_cannot_be_compared_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(tmp_path / "0").mkdir()
    stages = {"full_precision": 4.0, "trained": 5.0, "packed": 5.0}
    RunResult(perplexity=Perplexity("text", 8, 8, 8, stages)).save(tmp_path / "0")
    good, bad = (
        Outcome(0, "optim.lr=1", str(tmp_path / "0"), "done"),
        Outcome(1, "optim.lr=2", str(tmp_path / "1"), "diverged:\n  nan", 1),
    )
    assert told([good, bad]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "no comparison: fewer than two of 2 jobs were measured" and len(said) == 3
    assert said[2] == "job 1  optim.lr=2  not run  failed: diverged: nan"
    assert told([good]) == 0 and "no comparison" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"hydra/sweeper": "nosuch"}, "Could not find 'hydra/sweeper/nosuch' Available options in 'hydra/sweeper': basic"),
        ({"hydra/launcher": "nosuch"}, "Could not find 'hydra/launcher/nosuch'"),
        ({"hydra/sweeper": "qat_optuna", "hydra.sweeper.n_trails": 4}, "Key 'n_trails' not in 'OptunaSweeperConf'"),
        ({"hydra/sweeper": "qat_optuna", "hydra.sweeper.params": "{optim.lr: 'intervall(1,2)'}"}, "Unknown function 'intervall'"),
        ({"hydra/sweeper": "qat_optuna", "hydra.sweeper.direction": "down"}, "set either 'minimize' or 'maximize'"),
        ({"hydra/sweeper": "qat_optuna", "hydra.sweeper.n_trials": 1, "optim.warmup_steps": -1}, "No trials are completed yet"),
        ({"hydra/sweeper": "qat_optuna", "hydra.sweeper.params": "{optim.lr: 'glob(a)'}"}, "the sweep ended: "),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: dict[str, Any], said: str
) -> None:
    pytest.importorskip("optuna")
    assert code(["-m", *overrides(config, tmp_path / "search", **{"hydra.sweep.dir": tmp_path / "study", **asked})]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("qat.train: ") and said in last and "HYDRA_FULL_ERROR" not in os.environ


@pytest.mark.parametrize(("package", "launcher"), [("joblib", "qat_joblib"), ("submitit", "submitit_local")])
def test_launchers_run_jobs_in_processes_of_their_own(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, launcher: str
) -> None:
    """submitit's local executor starts jobs as its SLURM executor does, from pickles of the task."""
    pytest.importorskip(package)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    swept = {"trainer.max_steps": 1, "hydra/launcher": launcher, "hydra.sweep.dir": tmp_path / "jobs"}
    assert code(["-m", *overrides(config, tmp_path / "jobs", **swept)]) == 0
    assert [(one.number, one.status) for one in noted(str(tmp_path / "jobs"))] == [(0, "done")]


def test_what_a_wandb_agent_sends_composes() -> None:
    sweep = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    assert find(sweep["metric"]["name"]).better == "down" and sweep["metric"]["goal"] == "minimize"
    ends = [
        [f"{key}={value}" for value in said.get("values", [said.get("min"), said.get("max")])]
        for key, said in sweep["parameters"].items()
    ]
    assert sweep["command"][1:4] == ["python", "-m", "qat.train"] and sweep["command"][-1] == "${args_no_hyphens}"
    for chosen in product(*ends):
        settings = parse([*sweep["command"][4:-1], *chosen]).settings
        config = compose_run([as_typed(one) for one in settings])
        assert config.logger["wandb"]["offline"] is False and f"optim.lr={config.optim.lr}" in chosen


def test_a_wandb_agent_starts_a_run_of_its_sweep(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent itself; what its server would send it is given, and the run is offline."""
    pytest.importorskip("wandb")
    from wandb.wandb_agent import Agent

    sent = {"WANDB_DIR": str(tmp_path), "WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": ""}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name, value in {**sent, "WANDB_SILENT": "true", "PATH": path, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    sweep = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    small = overrides(config, tmp_path / "run", **{"trainer.max_steps": 2, "logger.wandb.offline": "true"})
    agent = Agent(None, None)
    agent._sweep_command = [one for one in sweep["command"] if "=" not in one or one == "logger=wandb"]
    agent._sweep_command[-1:-1] = small
    chosen = {"quant.granularity": {"value": "channel"}, "optim.warmup_steps": {"value": 1}}
    agent._command_run({"type": "run", "run_id": "run1", "program": sweep["program"], "args": chosen})
    assert agent._run_processes["run1"].wait(timeout=300) == 0
    [part] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    found = records(part)
    told = next(one["run"] for one in found if one["type"] == "run")
    assert (told["run_id"], told["sweep_id"]) == ("run1", "sweep1")
    assert merged(found, "config")["quant"]["granularity"] == "channel"
    assert sweep["metric"]["name"] in merged(found, "summary")


def test_torn_lines_of_a_sweeps_file_are_none(tmp_path: Path) -> None:
    line = json.dumps({"number": 1, "words": "a=1", "folder": "x", "status": "done"})
    (tmp_path / "jobs.jsonl").write_text(f'{line}\n{{"number": 2, "wor')
    assert [one.number for one in noted(str(tmp_path))] == [1]
