"""A sample of `make faults`, which tries all: each kind of harm, at operations that decide something."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import disturbances
from faults.inputs import write_model, write_text
from faults.machine import COMPILER, Machine
from faults.scenes import Scene, announce, exports, runs

SAMPLE = [
    *("fresh kill rename /config.yaml", "fresh kill fsync /checkpoints", "resumed torn write /metrics.csv"),
    *("resumed kill fsync /.packed", "fresh double mkdir /.packed", "fresh signal write /samples.md"),
    *("resumed signal write /metrics.csv", "fresh eio write /checkpoints", "resumed full mkdir /.packed"),
    *("packed kill exchange /x", "packed full write /.x", "hf torn write /.x", "hf eio fsync /.x", "gguf kill rename /x.gguf"),
]
"""Scene, mode, and the last operation whose line has these words."""


Scenes = tuple[Machine, dict[str, tuple[Scene, list[str]]]]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenes]:
    if COMPILER is None:
        pytest.skip("no C compiler for the library that lets file operations fail")
    folder = tmp_path_factory.mktemp("faults")
    words = announce(write_model(folder / "model"), write_text(folder / "text.txt"), folder)
    with Machine(folder) as machine:
        found: list[Scene] = [*runs(machine, words, folder), *exports(machine, words, folder)]
        yield machine, {scene.name: (scene, scene.disturbed(machine).operations) for scene in found}


@pytest.mark.parametrize("name", SAMPLE)
def test_nothing_is_lost(scenes: Scenes, name: str) -> None:
    machine, known = scenes
    which, mode, operation, place = name.split()
    scene, operations = known[which]
    at = [n for n, line in enumerate(operations, 1) if line.split(" ", 1)[1].startswith(f"{operation} {place}")]
    assert at, operations
    kinds: Any = [(kind, number, check) for kind in disturbances.HARM.values() for _, kind, number, check in kind]
    number, check = next((number, check) for known_mode, number, check in kinds if known_mode == mode)
    disturbances.attempt(machine, scene, at[-1], mode, number, check)


def test_hostile_files_run_nothing() -> None:
    """A few of them; in a process of its own, which forks."""
    command = [sys.executable, str(Path(__file__).parent), "hostile", "--every", "12"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and ", 0 failures" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
