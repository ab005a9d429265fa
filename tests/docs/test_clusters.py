"""The scripts for clusters, as far as a machine without one allows: they parse and compose, and stand-ins run them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qat.config import TrainConfig
from qat.config.compose.command import parse
from qat.config.compose.composing import compose_config, compose_run
from qat.config.compose.register import register
from qat.training.folder import is_named_by_time

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = ROOT / "docs" / "clusters"
SCRIPTS = sorted(CLUSTERS.glob("*.sh"))
GIVEN = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": "2"}
SKY = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1"}
KEYS_OF_SKYPILOT = {"name", "resources", "num_nodes", "workdir", "file_mounts", "envs", "setup", "run"}


def stand_in(folder: Path, name: str, code: int = 0) -> None:
    """A command that notes its arguments and ends with that code."""
    file = folder / name
    file.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> "{folder}/said"\nexit {code}\n')
    file.chmod(0o755)


def words_of(script: str, folder: Path, *arguments: str, code: int = 0, **given: str) -> tuple[int, list[str]]:
    """Exit code of a script whose srun, scontrol and torchrun are stand-ins, and the words that they were called with."""
    for name in ("srun", "scontrol", "torchrun"):
        stand_in(folder, name, code if name == "srun" else 0)
    environment = {**os.environ, **given, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script, "script", *arguments], env=environment, capture_output=True, text=True)
    return done.returncode, (folder / "said").read_text().splitlines()


def composed(words: list[str]) -> TrainConfig:
    """Of the settings after qat.train."""
    settings = words[words.index("qat.train") + 1 :]
    settings = settings[: settings.index("scontrol")] if "scontrol" in settings else settings
    return compose_run(parse(settings).settings)


def check(config: TrainConfig, devices: int, nodes: int) -> None:
    assert (config.trainer.devices, config.trainer.num_nodes, config.trainer.strategy) == (devices, nodes, "fsdp2")
    assert config.resume == "auto" and config.run.dir and not is_named_by_time(Path(config.run.dir))
    assert config.trainer.accelerator == "gpu" and config.trainer.precision == "bf16-mixed"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_parse(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", script], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize(("name", "nodes"), [("slurm.sh", 2), ("slurm_torchrun.sh", 1)])
def test_slurm_starts_a_process_for_each_gpu(name: str, nodes: int, tmp_path: Path) -> None:
    text = (CLUSTERS / name).read_text()
    code, words = words_of(text, tmp_path, "recipe=smollm2_135m", "data.train=a text.txt", **GIVEN)
    assert code == 0 and words[0] == "srun"
    config = composed([word.replace("data.train=a text.txt", "data.train='a text.txt'") for word in words])
    check(config, 8, nodes)
    assert config.run.dir == "runs/slurm/7" and config.data.train == "a text.txt"
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, flags=re.M))
    assert int(asked["nodes"]) == nodes and int(asked["gpus-per-node"]) == 8 and "#SBATCH --requeue" in text


@pytest.mark.parametrize(("ended", "again"), [(143, True), (1, False), (0, False)])
def test_a_job_that_was_ended_is_queued_again_and_one_that_failed_is_not(ended: int, again: bool, tmp_path: Path) -> None:
    code, words = words_of((CLUSTERS / "slurm.sh").read_text(), tmp_path, "recipe=smollm2_135m", code=ended, **GIVEN)
    assert code == ended and (words[-3:] == ["scontrol", "requeue", "7"]) is again


def test_skypilot_starts_torchrun_on_each_node(tmp_path: Path) -> None:
    task: dict[str, Any] = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    assert set(task) == KEYS_OF_SKYPILOT and task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8"
    _, words = words_of(task["run"], tmp_path, **SKY, **task["envs"])
    assert words[:7] == ["torchrun", "--nnodes", "2", "--node-rank", "0", "--nproc-per-node", "8"]
    check(composed(words), 8, 2)
    assert str(Path(words[-2].partition("=")[2]).parent) in task["file_mounts"]


def test_the_job_of_kubernetes_is_one() -> None:
    text = (CLUSTERS / "kubernetes.yaml").read_text()
    spec = yaml.safe_load(text)["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    config = composed(container["args"])
    check(config, container["resources"]["limits"]["nvidia.com/gpu"], 1)
    assert container["command"] == ["torchrun"] and Path(config.run.dir or "").is_relative_to(
        container["volumeMounts"][0]["mountPath"]
    )
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(yaml.safe_load(text), "1.29", strict=True)


def test_jobs_of_several_devices_under_submitit_compose() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = next(
        line for line in (ROOT / "docs/guides/devices.md").read_text().splitlines() if "hydra/launcher=qat_submitit" in line
    )
    settings = [word for word in shlex.split(command)[2:] if "=" in word]
    register(settings)
    found = compose_config("train", [word for word in settings if "," not in word], None)
    assert found.hydra.launcher.tasks_per_node == found.trainer.devices == found.hydra.launcher.gpus_per_node == 8
