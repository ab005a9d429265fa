"""resume=auto: one line starts a run, continues it, says that it is done, and refuses a folder with another one."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import losses, overrides, started, stop_after

from qat.config import TrainConfig
from qat.reporting.result import read_result
from qat.train import main, run


def test_the_same_line_starts_continues_and_ends(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, more = tmp_path / "auto", {"trainer.max_steps": 5000, "resume": "auto", "optim.lr": "null"}
    arguments = overrides(config, folder, **more)
    process = started(arguments, folder / "metrics.csv")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    step = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    fewer = [one.replace("max_steps=5000", f"max_steps={step + 4}") for one in arguments]
    main(fewer)
    assert f"{folder} goes on after step {step}; changed: trainer.max_steps 5000 -> {step + 4}\n" in capsys.readouterr().out
    result = read_result(folder)
    assert 0 < step < 5000 and sorted(losses(folder)) == list(range(1, step + 5)) and result and result.status == "done"
    before = (folder / "result.json").read_bytes()
    capsys.readouterr()
    main(fewer)
    assert f"is done, {step + 4} of {step + 4} steps" in capsys.readouterr().out
    assert (folder / "result.json").read_bytes() == before
    with pytest.raises(SystemExit, match="2"):
        main([*fewer, "quant.granularity=channel"])
    words = f"qat.train: resume=auto, but run.dir={folder} holds another run: quant.granularity=channel cannot apply"
    said = capsys.readouterr().err
    assert said.startswith(words) and said.count("\n") == 1


def test_a_killed_run_goes_on_to_the_same_losses(config: TrainConfig, tmp_path: Path) -> None:
    whole = replace(config, run=replace(config.run, dir=str(tmp_path / "whole")))
    run(whole)
    killed = replace(config, resume="auto", trainer=replace(config.trainer, checkpoint_every=3))
    stop_after(killed, 8)
    assert run(killed).status == "done"
    assert losses(Path(killed.run.dir or "")) == losses(Path(whole.run.dir or ""))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(config: TrainConfig) -> None:
    config.resume = "auto"
    stop_after(config, 2)
    assert run(config).status == "done"
    assert sorted(losses(Path(config.run.dir or ""))) == list(range(1, 13))


def test_what_is_settled_late_is_no_other_run(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = overrides(config, tmp_path / "run", **{"trainer.max_epochs": 0.02, "optim.lr": "null", "resume": "auto"})
    main(arguments)
    assert "updates" in capsys.readouterr().out
    main(arguments)
    assert "is done" in capsys.readouterr().out.splitlines()[0]


def test_a_sweeps_job_whose_rate_the_model_says_is_not_run_again(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "-m",
        *overrides(config, tmp_path, **{"optim.lr": "null", "trainer.max_tokens": 128, "optim.lr_multiple": "6,7"}),
    ]
    main(arguments)
    capsys.readouterr()
    main(arguments)
    assert capsys.readouterr().out.count("is done and not run again") == 2


def test_what_may_change_is_recorded(config: TrainConfig) -> None:
    config.resume, folder = "auto", Path(config.run.dir or "")
    run(config)
    more = replace(config, trainer=replace(config.trainer, max_steps=14))
    assert run(more).status == "done"
    line = json.loads((folder / "overrides.jsonl").read_text())
    assert line["step"] == 12 and line["changes"] == {"trainer.max_steps": [12, 14]}


def test_a_run_that_a_callback_stopped_stays_so(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    stop = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/ce", "patience": 1, "min_delta": 100.0}
    config = replace(config, resume="auto", callbacks={"stop": stop}, trainer=replace(config.trainer, val_every=2))
    first = run(config)
    assert first.status.startswith("stopped at step ")
    capsys.readouterr()
    assert run(config).status == first.status and "to train on nevertheless: resume=" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["null", "runs/a/${now:%Y-%m-%d_%H-%M-%S}", "runs/${now:%Y-%m-%d_%H-%M-%S}/0"])
def test_a_folder_of_the_second_is_none_to_find_again(
    config: TrainConfig, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*overrides(config, tmp_path), f"run.dir={folder}", "resume=auto"])
    assert "resume=auto needs a run.dir that is the same at each start" in capsys.readouterr().err
