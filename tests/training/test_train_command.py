"""Training from the command line: killed, interrupted, many jobs, piped, with wrong flags."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_run import ROOT, command, losses, overrides, started

from qat.config import TrainConfig
from qat.config.compose.saved import load_config
from qat.train import main


def test_killed_process_resumes_from_the_command_line(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    arguments = overrides(config, folder, **{"trainer.max_steps": 400, "trainer.checkpoint_every": 3})
    process = started(arguments, folder / "checkpoints/last.ckpt")
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    more = str(step + 5)
    again = command(f"resume={folder}", f"trainer.max_steps={more}")
    done = subprocess.run(again, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(folder)) == list(range(1, step + 6))
    assert json.loads((folder / "result.json").read_text())["status"] == "done"


def test_ctrl_c_keeps_a_checkpoint_and_a_readable_result(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "interrupted"
    arguments = overrides(config, folder, **{"trainer.max_steps": 5000})
    process = started(arguments, folder / "metrics.csv")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    result = json.loads((folder / "result.json").read_text())
    step = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert result["status"].startswith(f"interrupted at step {step}; continue with resume=")
    assert result["perplexity"]["full_precision"] > 1 and "trained" not in result["perplexity"]
    assert "full precision" in output


def test_multirun_writes_one_folder_a_job(config: TrainConfig, tmp_path: Path) -> None:
    arguments = overrides(config, tmp_path / "sweep", **{"trainer.max_steps": 1, "quant.granularity": "tensor,channel"})
    done = subprocess.run(command("-m", *arguments), env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    granularity = [load_config(str(tmp_path / "sweep" / job)).quant.granularity for job in ("0", "1")]
    assert granularity == ["tensor", "channel"]


def test_piped_output_is_lines_and_ends_with_the_table(config: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    progress = {"trainer.progress": "true", "trainer.max_steps": 20, "logger": "wandb"}
    arguments = overrides(config, tmp_path / "piped", **progress)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == f"run        {tmp_path / 'piped'} (done)", done.stdout
    table = max(i for i, line in enumerate(lines) if line.startswith("┏"))
    wandb = [i for i, line in enumerate(lines) if line.startswith("wandb")]
    assert wandb and max(wandb) < table
    steps = [line for line in lines if line.startswith("QAT")]
    assert len(steps) == 10 and steps[-1].startswith("QAT step 20/20, loss ") and steps[-1].endswith(" tokens/s, 0:00 left")
    assert "\r" not in done.stdout and not any(line == "" and i < table for i, line in enumerate(lines)), done.stdout


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--foo", "unrecognized arguments: --foo. Allowed: --help [GROUP], --dry-run, -v, -m"),
        ("--trainer.max_steps=5", "settings have no dashes: trainer.max_steps=5"),
        ("--cfg=nothing", "invalid choice: 'nothing'"),
    ],
)
def test_an_unknown_flag_is_one_line(capsys: pytest.CaptureFixture[str], flag: str, words: str) -> None:
    for arguments in ([flag], ["recipe=quickstart", flag]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith("qat.train: ") and words in shown.err and shown.err.count("\n") == 1


def test_resume_takes_no_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["resume=somewhere", "-m"])
    assert "-m does not go with resume=" in capsys.readouterr().err
