"""What the README shows works: its python runs, its commands compose, its files exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qat.config.compose.keys import check_keys, options

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)
COMMANDS = [line.partition("#")[0].strip() for _, block in BLOCKS for line in block.splitlines() if line.startswith("python -m")]


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python" and "qat.convert" in code])
def test_python_runs(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 linear layers converted" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_real_recipes_keys_and_verbs(command: str) -> None:
    words = command.split()
    assert (ROOT / (words[2].replace(".", "/") + ".py")).exists() or (ROOT / words[2].replace(".", "/") / "__main__.py").exists()
    if words[2] != "qat.train":
        flags = {word for word in words if word.startswith("--")}
        help_text = subprocess.run([sys.executable, "-m", words[2], "--help"], capture_output=True, text=True, cwd=ROOT).stdout
        assert all(flag in help_text for flag in flags)
        return
    overrides = [word for word in words[3:] if "=" in word]
    check_keys(overrides)
    groups = options()
    for key, _, value in (override.partition("=") for override in overrides):
        assert key not in groups or set(value.split(",")) <= set(groups[key])


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M)


def test_file_map_is_complete() -> None:
    table = README.partition("## Where things are")[2]
    named = {ROOT / name for name in re.findall(r"`((?:qat|conf|recipes|tests|csrc|benchmarks)/[\w/.]*)`", table)}
    assert all(path.exists() for path in named)
    for path in (ROOT / "qat").iterdir():
        if path.name not in ("__init__.py", "__pycache__", "py.typed"):
            assert path in named, f"{path.name} is missing from the README's file map"
