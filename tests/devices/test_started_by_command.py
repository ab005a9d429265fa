"""The command itself with two devices: plain, by torchrun, as a sweep; and what signals and kills make of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import torch
from several import assert_same_training

from qat.parallel.group import free_port

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 900.0
"""Seconds for a command that ends by itself, on a machine that is busy."""
NO_HANG = 20.0
"""Seconds in which all must have ended after one process did, on a machine that does nothing else."""


class Command:
    """A command line in a group of processes of its own, which is killed at the end of the test whatever becomes of it."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "QAT_CACHE": str(folder / "cache"), "GLOO_SOCKET_IFNAME": "lo"}
        self.output = folder / "output.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                arguments, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def ended(self, seconds: float = PATIENCE) -> int:
        """The exit code, once nothing is left of what it had started by now."""
        until, everyone = time.monotonic() + seconds, _below(self.process.pid)
        code = self.process.wait(seconds)
        while (left := [one for one in everyone if _lives(one)]) and time.monotonic() < until:
            time.sleep(0.1)
        assert not left, f"processes are left: {left}"
        return code

    def reaches(self, file: Path, words: str) -> None:
        until = time.monotonic() + PATIENCE
        while not (file.exists() and words in file.read_text()):
            assert self.process.poll() is None and time.monotonic() < until, self.text
            time.sleep(0.02)

    def ranks(self) -> list[int]:
        """The processes of the two ranks, in order, while they live."""
        return sorted(one for one in _below(self.process.pid) if _is_rank(one))

    def rank(self, number: int) -> int:
        """The process of a rank."""
        assert len(self.ranks()) == 2, self.ranks()
        return self.ranks()[number]

    def close(self) -> None:
        for one in _below(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _below(process: int) -> list[int]:
    """All that it has started, and they; torchrun's workers have a group of their own."""
    try:
        return [one.pid for one in psutil.Process(process).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _lives(number: int) -> bool:
    try:
        return bool(psutil.Process(number).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _is_rank(number: int) -> bool:
    """Which of the group train: those that hold a text or a model open, not the launcher's helpers."""
    try:
        words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"qat.train" in words or any(b"spawn_main" in word for word in words)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Command] = []

    def begin(*arguments: str, torchrun: bool = False) -> Command:
        run = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", f"{free_port()}", "-m"] if torchrun else []
        started.append(Command([sys.executable, "-m", *run, "qat.train", *arguments], tmp_path))
        return started[-1]

    yield begin
    for command in started:
        command.close()


@pytest.fixture
def settings(still: Path, text_file: Path) -> list[str]:
    values = {
        "recipe": "plain", "model.path": still, "data.train": text_file, "data.sequence_length": 32, "data.batch_size": 4,
        "data.valid_fraction": 0.1, "optim.lr": 5e-3, "trainer.max_steps": 6, "trainer.log_every_n_steps": 1,
        "trainer.threads": 1, "trainer.accelerator": "cpu", "export.formats": "[hf]", "trainer.val_every": 3,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def _once(text: str, *lines: str) -> None:
    for line in lines:
        assert text.count(line) == 1, (line, text)


SAID = ("still: 14 of 15 linear layers converted", "perplexity full precision", "perplexity packed", "QAT step 6/6", "(done)")


def test_plain_and_torchrun_are_one_run(start: Any, settings: list[str], tmp_path: Path):
    for name, devices in (("plain", ["trainer.devices=2"]), ("torchrun", [])):
        command = start(*settings, *devices, f"run.dir={tmp_path}/{name}", torchrun=name == "torchrun")
        assert command.ended() == 0, command.text
        _once(command.text, *SAID)
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
    both = start(*settings, "trainer.devices=2", "trainer.max_steps=2", *sweep)
    assert both.ended() == 0, both.text
    for number in (0, 1):
        assert json.loads((tmp_path / f"sweep/{number}/result.json").read_text())["status"] == "done"
    assert len(list(tmp_path.glob("sweep/*/result.json"))) == 2
    _once(both.text, *(f"job {number}: " if launcher else f"job {number} of 2" for number in (0, 1)))


@pytest.mark.parametrize("torchrun", [False, True], ids=["plain", "torchrun"])
def test_more_devices_than_there_are(start: Any, settings: list[str], tmp_path: Path, torchrun: bool):
    wrong = start(*settings, "trainer.devices=4096", f"run.dir={tmp_path}/run", torchrun=torchrun)
    assert wrong.ended() == (1 if torchrun else 2)  # torchrun has a code of its own
    _once(wrong.text, "qat.train: trainer.")
    assert not (tmp_path / "run").exists()


def test_what_one_rank_alone_cannot_read_ends_all_with_its_reason(settings: list[str], tmp_path: Path):
    """As on a machine whose disk lacks a file: said once, by rank 0, whichever of them ends first."""
    here = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", f"{free_port()}"]
    line = shlex.join([sys.executable, "-m", "qat.train", *settings, f"run.dir={tmp_path}/run"])
    wrong = Command([*here, "--no-python", "bash", "-c", f"{line} --config-dir={tmp_path}/conf$RANK"], tmp_path)
    (tmp_path / "conf0").mkdir()
    try:
        assert wrong.ended() == 1
        _once(wrong.text, "qat.train: rank 1 of 2: ", f"{tmp_path}/conf1")
        assert "interrupted" not in wrong.text and not (tmp_path / "run").exists()
    finally:
        wrong.close()


LONG = ["trainer.max_steps=100000", "trainer.checkpoint_every=5", "trainer.val_every=null", "export.formats=[]"]


def _at_a_step(start: Any, settings: list[str], folder: Path, strategy: str, torchrun: bool) -> Command:
    """A run that is somewhere in one of its steps 6 to 16."""
    chance = Random(f"{strategy} {torchrun}")
    devices = [] if torchrun else ["trainer.devices=2"]
    command = start(*settings, *LONG, *devices, f"trainer.strategy={strategy}", f"run.dir={folder}", torchrun=torchrun)
    command.reaches(folder / "metrics.csv", f"\n{chance.randrange(6, 17)},")
    time.sleep(0.2 * chance.random())
    return command


def _ended_in_time(command: Command) -> int:
    busy = max(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0)
    began, code = time.monotonic(), command.ended(NO_HANG * busy + 60)
    assert time.monotonic() - began < NO_HANG * busy
    return code


def _kept(folder: Path) -> int:
    """The step of the checkpoint."""
    return int(torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"])


@pytest.mark.parametrize(
    ("strategy", "torchrun", "killed"), [("ddp", False, 0), ("ddp", True, 1), ("fsdp2", True, 0), ("fsdp2", False, 1)]
)
def test_kill_of_a_rank(start: Any, settings: list[str], tmp_path: Path, strategy: str, torchrun: bool, killed: int):
    folder = tmp_path / "run"
    command = _at_a_step(start, settings, folder, strategy, torchrun)
    os.kill(command.rank(killed), signal.SIGKILL)
    assert _ended_in_time(command) == 1
    assert _kept(folder) % 5 == 0 and _kept(folder) >= 5
    status = json.loads((folder / "result.json").read_text())["status"]
    assert status == "running" or (killed == 1 and status.startswith("failed: a process of this run ended")), status


@pytest.mark.parametrize(
    ("number", "strategy", "torchrun", "whom"),
    [
        (signal.SIGTERM, "ddp", False, None),
        (signal.SIGTERM, "fsdp2", True, None),
        (signal.SIGINT, "fsdp2", False, None),
        (signal.SIGINT, "ddp", True, 0),
        (signal.SIGINT, "fsdp2", False, 1),
    ],
)
def test_signals(
    start: Any, settings: list[str], tmp_path: Path, number: int, strategy: str, torchrun: bool, whom: int | None
) -> None:
    """To the launcher, or to a rank alone; torchrun has an exit code of its own."""
    folder = tmp_path / "run"
    command = _at_a_step(start, settings, folder, strategy, torchrun)
    os.kill(command.process.pid if whom is None else command.rank(whom), number)
    assert _ended_in_time(command) == (1 if torchrun else 128 + number)
    result, step = json.loads((folder / "result.json").read_text()), _kept(folder)
    assert result["status"] == f"interrupted at step {step}; continue with resume={folder}" and step >= 6
    _once(command.text, f"run        {folder} (interrupted")
