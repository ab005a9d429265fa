"""The verb's command line: flags anywhere, sweeps that outlive a bad job, errors of one line, the objective for sweepers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from qat import train
from qat.config import TrainConfig
from qat.config.compose.command import parse
from qat.config.compose.saved import save_config
from qat.reporting.result import Perplexity, RunResult


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[TrainConfig]:
    """The configurations that the verb would have run; a run trains to a perplexity of its seed."""
    found: list[TrainConfig] = []

    def run(config: TrainConfig) -> Any:
        found.append(config)
        if config.seed == 13:
            raise ValueError("thirteen\nis not allowed")
        if config.seed == 14:
            raise RuntimeError("a bug")
        signal, status = (2, "interrupted at step 1; continue with resume=x") if config.seed == 15 else (None, "done")
        return RunResult(perplexity=Perplexity("text", 1, 1, 1, {"trained": float(config.seed)}), status=status, signal=signal)

    monkeypatch.setattr(train, "_perform", run)
    monkeypatch.setattr("qat.reporting.table.print_table", lambda result: None)
    monkeypatch.chdir(tmp_path)
    return found


def code(*arguments: str) -> int:
    try:
        train.main(list(arguments))
    except SystemExit as error:
        assert isinstance(error.code, int)
        return error.code
    return 0


def test_flags_stand_anywhere(ran: list[TrainConfig]) -> None:
    assert code("recipe=quickstart", "--dry-run", "seed=3") == 0
    assert code("seed=3,4", "-m", "recipe=quickstart", "--dry-run") == 0
    assert [(config.seed, config.dry_run) for config in ran] == [(3, True), (3, True), (4, True)]


def test_the_documented_sweep(ran: list[TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert code("-m", "recipe=quickstart", "quant=ternary,binary", "run.dir=runs/sweep", "seed=7") == 0
    assert [(config.quant.weight, config.run.dir) for config in ran] == [("ternary", "runs/sweep/0"), ("binary", "runs/sweep/1")]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "job 0  quant=ternary  runs/sweep/0  trained 7.0000  done",
        "job 1  quant=binary  runs/sweep/1  trained 7.0000  done",
    ]


def test_the_jobs_of_a_sweep_share_a_folder_by_default(ran: list[TrainConfig]) -> None:
    assert code("-m", "recipe=quickstart", "seed=1,2,3") == 0
    folders = [Path(config.run.dir or "") for config in ran]
    assert [folder.name for folder in folders] == ["0", "1", "2"] and len({folder.parent for folder in folders}) == 1


def test_a_bad_job_does_not_end_the_sweep(ran: list[TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert code("-m", "recipe=quickstart", "quant=ternary,typo", "seed=1,13,14,2", "trainer.max_steps=5") == 2
    assert [config.seed for config in ran] == [1, 13, 14, 2]
    shown = capsys.readouterr()
    summary = shown.out.splitlines()[-8:]
    assert "job 1  quant=ternary seed=13" in summary[1] and summary[1].endswith("failed: thirteen is not allowed")
    assert summary[2].endswith("failed: RuntimeError: a bug") and summary[3].endswith("trained 2.0000  done")
    assert all("not run" in line and "quant/typo" in line for line in summary[4:])
    assert shown.err.count("qat.train: ") == 5


def test_an_interrupted_job_ends_the_sweep(ran: list[TrainConfig]) -> None:
    assert code("-m", "recipe=quickstart", "seed=1,15,2") == 130
    assert [config.seed for config in ran] == [1, 15]


def test_hydras_own_sweepers_get_the_objective(ran: list[TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.plugins import Plugins

    Plugins.instance()  # loads the launcher's module anew, so first
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    found: list[Any] = []
    launch = BasicLauncher.launch

    def keep(self: Any, *arguments: Any, **more: Any) -> Any:
        found.extend(launch(self, *arguments, **more))
        return found

    monkeypatch.setattr(BasicLauncher, "launch", keep)
    assert code("recipe=quickstart", "-m", "seed=2,13,4", "hydra/sweeper=basic", "run.dir=runs/x") == 2
    values = [job.return_value for job in found]
    assert values == [2.0, None, 4.0]  # None: Optuna notes a failed trial, and goes on; NaN ends its search
    assert [config.run.dir for config in ran] == ["runs/x/0", "runs/x/1", "runs/x/2"]


def test_hydra_silences_nobody(ran: list[TrainConfig]) -> None:
    """Its logging named `disabled` turns off every logger that there is, and with them the warnings of transformers."""
    loggers = [logging.getLogger(name) for name in ("transformers", "lightning.pytorch")]
    assert code("recipe=quickstart", "-m", "seed=1,2", "hydra/sweeper=basic", "run.dir=runs/x") == 0
    assert [logger.disabled for logger in loggers] == [False, False]


def test_cfg_shows_the_job(ran: list[TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert code("model.path=my [dir]", "--cfg", "job") == 0
    assert "path: my [dir]" in capsys.readouterr().out and not ran


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe=quickstart", "seed"], "'seed' is no setting"),
        (["recipe=quickstart", "=3"], "'=3' is no setting"),
        (["recipe=quickstart", "seed=1,2"], "Ambiguous value"),
        (["recipe=typo", "--cfg", "job"], "recipe/typo"),
        (["-m", "recipe=quickstart", "seed=["], "cannot be read"),
        (["resume=nowhere"], "config.yaml is missing"),
        (["resume="], "resume= names no folder"),
        (["resume=nowhere", "-m"], "-m does not go with resume="),
        (["resume=nowhere", "--config-dir", "."], "--config-dir does not go with resume="),
        (["recipe=quickstart", "--config-dir", "nowhere"], "no such folder"),
        (["recipe=quickstart", "seed=13"], "thirteen is not allowed"),
        (["callbacks={}", "logger=[a"], "cannot be read"),
    ],
)
def test_an_error_is_one_line(
    ran: list[TrainConfig], capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert code(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("qat.train: ") and words in shown.err and shown.err.count("\n") == 1, shown.err


def test_resume_takes_settings_as_the_start_does(ran: list[TrainConfig], tmp_path: Path) -> None:
    folder = tmp_path / "a run [1]"
    folder.mkdir()
    save_config(TrainConfig(), folder)
    assert code(f"resume={folder}", "eval.texts={a: my text.txt}", "--dry-run", "export.formats=[gguf]") == 0
    assert code(f"resume='{folder}'") == 0
    assert ran[0].eval.texts == {"a": "my text.txt"} and ran[0].dry_run and ran[0].export.formats == ["gguf"]
    assert [config.resume for config in ran] == [str(folder)] * 2


def test_a_folder_of_ones_own_is_a_flag_of_ours() -> None:
    command = parse(["--config-dir", "mine", "seed=3"])
    assert (command.settings, command.config_dir, command.by_hydra) == (["seed=3"], "mine", False)
    assert parse(["--cfg", "job", "seed=3"]).by_hydra and parse(["hydra/launcher=x"]).by_hydra
