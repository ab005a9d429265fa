"""However a run ends: the exit code, the status in result.json, and what lies in the folder to go on from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from qat.config import DataConfig, ExportConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, TrainerConfig
from qat.config.compose.saved import load_config
from qat.train import main, run
from qat.training.callbacks import Throughput
from qat.training.callbacks.metrics_file import read_rows
from qat.training.folder import locked, made
from qat.training.signals import Interrupted, listening

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tiny_model: Path, text_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=str(tiny_model)),
        data=DataConfig(train=str(text_file), sequence_length=32, batch_size=4, valid_fraction=0.1),
        optim=OptimConfig(lr=5e-3),
        trainer=TrainerConfig(max_steps=6, accelerator="cpu", progress=False, log_every_n_steps=1, threads=1),
        export=ExportConfig(formats=[]),
        run=RunConfig(name="tiny", dir=str(tmp_path / "run")),
    )


def command(config: TrainConfig, folder: Path, *more: str) -> list[str]:
    settings = {"model.path": config.model.path, "data.train": config.data.train, "run.dir": folder, "export.formats": "[]"}
    fixed = ["recipe=plain", "data.sequence_length=32", "data.batch_size=4", "trainer.log_every_n_steps=1", "trainer.threads=1"]
    return [sys.executable, "-m", "qat.train", *(f"{key}={value}" for key, value in settings.items()), *fixed, *more]


def started(arguments: list[str], awaited: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        arguments,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it is ignored, which a run heeds
    )
    deadline = time.time() + 120
    while not awaited.exists():
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.02)
    return process


def status(folder: Path) -> str:
    return str(json.loads((folder / "result.json").read_text())["status"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_training_at_its_step(config: TrainConfig, tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "r"
    process = started(command(config, folder, "trainer.max_steps=30000"), folder / "metrics.csv")
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in output, output
    step = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert status(folder) == f"interrupted at step {step}; continue with resume={folder}"


@pytest.mark.parametrize("measurement", [1, 4])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_of_training(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, measurement: int, number: signal.Signals
) -> None:
    """While the full-precision model is measured, and the packed one."""
    from qat.training import stages

    original = stages.Measure.__call__

    calls = []

    def signalled(self: Any, model: Any) -> Any:
        calls.append(model)
        if len(calls) == measurement:
            os.kill(os.getpid(), number)
        return original(self, model)

    monkeypatch.setattr(stages.Measure, "__call__", signalled)
    before = signal.getsignal(number)
    result = run(config)
    folder = Path(result.folder)
    step = 6 if measurement == 4 else 0
    assert result.signal == number and signal.getsignal(number) is before
    assert status(folder) == f"interrupted at step {step}; continue with resume={folder}"
    monkeypatch.undo()
    assert run(load_config(str(folder))).status == "done"


class Terminates(pl.Callback):
    """Sends SIGTERM within step 3 or 4."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("step", "validated"), [(3, [2]), (4, [2, 4])])
def test_a_signal_does_not_wait_for_a_validation_that_is_not_due(config: TrainConfig, step: int, validated: list[int]) -> None:
    config.trainer = replace(config.trainer, val_every=2, val_batches=1, samples=0)
    config.callbacks = {"kill": {"_target_": "test_endings.Terminates", "step": step}}
    result = run(config)
    assert result.signal == signal.SIGTERM and result.status.startswith(f"interrupted at step {step};")
    rows = read_rows(Path(result.folder) / "metrics.csv")[0]
    assert [int(row["step"]) for row in rows if "val/loss" in row] == validated


def test_a_second_signal_does_not_wait_for_the_step() -> None:
    with pytest.raises(Interrupted) as ended, listening() as signals, signals.wait_for_step():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
    assert ended.value.code == 143


def test_a_live_run_is_not_resumed_nor_its_folder_taken(config: TrainConfig) -> None:
    config.trainer = replace(config.trainer, max_steps=1)
    folder = Path(run(config).folder)
    holder = f"import time; from qat.training.folder import locked\nfrom pathlib import Path\nwith locked(Path({str(folder)!r})):"
    holder += f"\n open({str(folder / 'held')!r}, 'w'); time.sleep(60)"
    process = started([sys.executable, "-c", holder], folder / "held")
    try:
        for taken in (load_config(str(folder)), config):
            with pytest.raises(ValueError, match=f"belongs to a run that is alive, process {process.pid} on"):
                run(taken)
    finally:
        process.kill()
        process.wait()
    with locked(folder):
        pass


def test_two_runs_of_one_second_get_two_folders(config: TrainConfig, tmp_path: Path) -> None:
    config.run = RunConfig(name="a", dir=str(tmp_path / "2026-01-01_00-00-00"))
    assert [made(config).name for _ in range(3)] == [f"2026-01-01_00-00-00{end}" for end in ("", "-2", "-3")]


def early(patience: int = 1) -> dict[str, Any]:
    target = "lightning.pytorch.callbacks.EarlyStopping"
    return {"es": {"_target_": target, "monitor": "val/ce", "patience": patience, "min_delta": 5}}


def test_stopped_by_a_callback(config: TrainConfig) -> None:
    config.trainer = replace(config.trainer, max_steps=40, val_every=2, val_batches=1, samples=0)
    config.callbacks = {**early(), "mc": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "monitor": "val/ce"}}
    result = run(config)
    folder = Path(result.folder)
    assert result.status.startswith("stopped at step 4 by EarlyStopping: Monitored metric val/ce did not improve")
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert result.perplexity["packed"] == result.perplexity["trained"] and (folder / "packed").is_dir()
    assert list((folder / "model_checkpoints").glob("*.ckpt"))


def test_stopped_by_a_callback_before_the_first_step(config: TrainConfig) -> None:
    folder = run(config).folder
    timer = ["++callbacks.t._target_=lightning.pytorch.callbacks.Timer", "++callbacks.t.duration=00:00:00:00"]
    assert run(load_config(folder, ["trainer.max_steps=9", *timer])).status == "stopped at step 6 by Timer"


def test_a_callback_that_waits_for_validations_that_never_come(config: TrainConfig) -> None:
    config.callbacks = early()
    with pytest.raises(ValueError, match=r"EarlyStopping watches val/ce, but there are no validations; set trainer.val_every"):
        run(config)


def test_a_finished_run_says_so_and_max_steps_may_be_raised(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(config).folder
    capsys.readouterr()
    again = run(load_config(folder))
    assert capsys.readouterr().out == f"{folder} is done, 6 of 6 steps; raise trainer.max_steps to train on\n"
    assert again.status == "done" and again.perplexity["trained"] > 1
    with pytest.raises(ValueError, match=r"trainer.max_steps=3 is below the step 6"):
        run(load_config(folder, ["trainer.max_steps=3"]))
    run(load_config(folder, ["trainer.max_steps=8"]))
    assert [int(row["step"]) for row in read_rows(Path(folder) / "metrics.csv")[0]] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("change", [{"data.batch_size": 2}, {"trainer.accumulate_grad_batches": 4}, {"optim.lr": 0.5}])
def test_overrides_of_a_resume_apply(config: TrainConfig, change: dict[str, Any]) -> None:
    """From the first step on, with as many batches a step as are asked for, though 6 steps are no multiple of 4 batches."""
    config.optim = replace(config.optim, schedule="constant")
    config.callbacks = {"rates": {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}}
    folder = Path(run(config).folder)
    result = run(load_config(str(folder), ["trainer.max_steps=8", *(f"{key}={value}" for key, value in change.items())]))
    content = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    sequences = 4 * 6 + 2 * change.get("trainer.accumulate_grad_batches", 1) * change.get("data.batch_size", 4)
    assert content["global_step"] == 8 and content["QATData"] == {"sequences": sequences, "step": 8}
    assert result.tokens == sequences * 32
    rows = read_rows(folder / "metrics.csv")[0]
    assert [int(row["step"]) for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]
    rates = {float(row[key]) for row in rows for key in row if key.startswith("lr-") and int(row["step"]) >= 6}
    assert rates == {change.get("optim.lr", 5e-3)}


def test_a_signal_while_the_model_is_loaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qat.models.hub.load_model", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        main(command(config, Path(str(config.run.dir)))[3:])
    assert ended.value.code == 130 and not Path(str(config.run.dir)).exists()
    assert capsys.readouterr().err.endswith("qat.train: interrupted by signal 2 before the run had a folder\n")


def test_the_rate_is_that_of_the_steps_since_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 8 tokens take 1 s each at first and 4 s after the first row."""
    clock, logged = [0.0], []
    row: dict[str, float] = {}
    monkeypatch.setattr("qat.training.callbacks.throughput.time.perf_counter", lambda: clock[0])
    rate, trainer = Throughput(2, row), SimpleNamespace(global_step=0, accumulate_grad_batches=1, world_size=1)
    module = SimpleNamespace(show=lambda *_: None, shown={})
    rate.on_train_start(trainer, module)  # type: ignore[arg-type]
    for step, seconds in enumerate([1, 1, 4, 4]):
        rate.on_train_batch_start(trainer, module, {}, step)  # type: ignore[arg-type]
        clock[0] += seconds
        trainer.global_step += 1
        rate.on_train_batch_end(trainer, module, None, {"input_ids": torch.zeros(2, 4)}, step)  # type: ignore[arg-type]
        logged.append(row.get("speed/tokens_per_second"))
    assert logged == [None, 8.0, 8.0, 2.0] and (rate.tokens, rate.seconds) == (32, 10.0)


def test_a_minute_s_checkpoints(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    monkeypatch.setattr("qat.training.callbacks.checkpoint.save", lambda trainer, folder: saved.append(trainer.global_step))
    config.trainer = replace(config.trainer, checkpoint_minutes=1e-9)
    run(config)
    assert saved == [1, 2, 3, 4, 5, 6]


def test_a_foreign_checkpoint_of_a_cluster_is_not_taken(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = run(replace(config, trainer=replace(config.trainer, max_steps=2), run=RunConfig(name="o", dir=str(tmp_path / "o"))))
    for place in (tmp_path, tmp_path / "run"):
        place.mkdir(exist_ok=True)
        (place / "hpc_ckpt_1.ckpt").write_bytes((Path(other.folder) / "checkpoints/last.ckpt").read_bytes())
    monkeypatch.chdir(tmp_path)
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "x", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("SLURM_NODEID", "0")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    folder = Path(run(config).folder)
    assert [int(row["step"]) for row in read_rows(folder / "metrics.csv")[0]] == [1, 2, 3, 4, 5, 6]
