"""A run's folder: refused before anything is loaded where it cannot be one, and named as a shell takes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qat.config import DataConfig, ModelConfig, QuantConfig, RunConfig, TrainConfig
from qat.config.compose.saved import save_config
from qat.conversion.record import Conversion
from qat.training.recording import Facts, recording
from qat.training.run import run
from qat.training.signals import Interrupted


def of(folder: Path, tmp_path: Path) -> TrainConfig:
    (tmp_path / "a.txt").write_text("x")
    data = DataConfig(train=str(tmp_path / "a.txt"))
    return TrainConfig(model=ModelConfig(path="/nowhere/at/all"), data=data, run=RunConfig(dir=str(folder)))


def test_a_folder_that_cannot_be_is_said_before_the_model_is_looked_for(tmp_path: Path) -> None:
    for folder in (tmp_path / "a.txt", tmp_path / "a.txt" / "deeper"):
        with pytest.raises(ValueError, match=r"run.dir=.*a.txt is a file; choose another folder"):
            run(of(folder, tmp_path))
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "metrics.csv").touch()
    save_config(TrainConfig(), tmp_path / "a run")
    with pytest.raises(ValueError, match=rf"already holds a run; continue it with 'resume={tmp_path}/a run', or"):
        run(of(tmp_path / "a run", tmp_path))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(ValueError, match=r"closed may not be written; choose another folder"):
        run(of(tmp_path / "closed" / "run", tmp_path))


def test_the_way_to_go_on_is_quoted_where_a_shell_needs_it(tmp_path: Path) -> None:
    folder = tmp_path / "my run [1]"
    folder.mkdir()
    with recording(Facts(TrainConfig(), Conversion("ternary", QuantConfig()), str(folder))) as book:
        raise Interrupted(15)
    assert book.result.status == f"interrupted at step 0; continue with 'resume={folder}'"
