"""The command itself with two devices: plain, by torchrun, as a sweep; and what is refused of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import Command, once
from several import assert_same_training

from qat.parallel.group import free_port

SAID = ("still: 14 of 15 linear layers converted", "perplexity full precision", "perplexity packed", "QAT step 6/6", "(done)")


def test_plain_and_torchrun_are_one_run(start: Any, settings: list[str], tmp_path: Path):
    for name, devices in (("plain", ["trainer.devices=2"]), ("torchrun", [])):
        command = start(*settings, *devices, f"run.dir={tmp_path}/{name}", torchrun=name == "torchrun")
        assert command.ended() == 0, command.text
        once(command.text, *SAID)
        lines = Counter(line for line in command.text.splitlines() if any(map(str.isalpha, line)))
        assert not [line for line, count in lines.items() if count > 1], command.text
    assert_same_training(tmp_path / "plain", tmp_path / "torchrun")
    results = [json.loads((tmp_path / one / "result.json").read_text()) for one in ("plain", "torchrun")]
    assert results[0]["config_hash"] == results[1]["config_hash"] and results[0]["export"]["done"] == ["hf"]
    assert sorted(one.name for one in tmp_path.iterdir() if one.is_dir() and one.name != "cache") == ["plain", "torchrun"]


@pytest.mark.parametrize("launcher", ["", "hydra/launcher=qat_joblib"], ids=["in turn", "joblib"])
def test_two_jobs_of_two_devices(start: Any, settings: list[str], tmp_path: Path, launcher: str):
    if launcher:
        pytest.importorskip("joblib")
    sweep = ["-m", "optim.lr=1e-3,2e-3", f"run.dir={tmp_path}/sweep", *([launcher] if launcher else [])]
    both = start(*settings, "trainer.devices=2", "trainer.max_steps=2", "trainer.val_every=null", "export.formats=[]", *sweep)
    assert both.ended() == 0, both.text
    for number in (0, 1):
        assert json.loads((tmp_path / f"sweep/{number}/result.json").read_text())["status"] == "done"
    assert len(list(tmp_path.glob("sweep/*/result.json"))) == 2
    once(both.text, *(f"job {number}: " if launcher else f"job {number} of 2" for number in (0, 1)))


@pytest.mark.parametrize("torchrun", [False, True], ids=["plain", "torchrun"])
def test_more_devices_than_there_are(start: Any, settings: list[str], tmp_path: Path, torchrun: bool):
    wrong = start(*settings, "trainer.devices=4096", f"run.dir={tmp_path}/run", torchrun=torchrun)
    assert wrong.ended() == (1 if torchrun else 2)  # torchrun has a code of its own
    once(wrong.text, "qat.train: trainer.")
    assert not (tmp_path / "run").exists()


def test_what_one_rank_alone_cannot_read_ends_all_with_its_reason(settings: list[str], tmp_path: Path):
    """As on a machine whose disk lacks a file: said once, by rank 0, whichever of them ends first."""
    here = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", f"{free_port()}"]
    line = shlex.join([sys.executable, "-m", "qat.train", *settings, f"run.dir={tmp_path}/run"])
    wrong = Command([*here, "--no-python", "bash", "-c", f"{line} --config-dir={tmp_path}/conf$RANK"], tmp_path)
    (tmp_path / "conf0").mkdir()
    try:
        assert wrong.ended() == 1
        once(wrong.text, "qat.train: rank 1 of 2: ", f"{tmp_path}/conf1")
        assert "interrupted" not in wrong.text and not (tmp_path / "run").exists()
    finally:
        wrong.close()
