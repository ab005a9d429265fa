"""Where a run comes from: the command that started it and the commit of the code, a line for each start."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import qat
from qat.reporting.page.reading import STARTS


def command() -> str | None:
    """The command line of this process, where it is one of the project's verbs; None of a Python caller's."""
    program = Path(sys.argv[0])
    package = Path(qat.__file__).parent
    if program.resolve().is_relative_to(package):
        module = ".".join(program.resolve().relative_to(package.parent).with_suffix("").parts).removesuffix(".__main__")
        return shlex.join(["python", "-m", module, *sys.argv[1:]])
    return shlex.join(["qat", *sys.argv[1:]]) if program.name == "qat" else None


def commit() -> str | None:
    """The commit of a checkout, with `+` where files differ from it; None of an installed package."""
    root = Path(qat.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def note_start(folder: Path, step: int) -> None:
    """Append a line to the record of the run's starts; `step` is the one that it goes on from."""
    said = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "step": step, "command": command(), "commit": commit()}
    with (folder / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(said) + "\n")
