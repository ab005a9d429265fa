"""What a person would do after a run: commands with its own paths, quoted so that a shell takes them as they are."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from qat.config.compose.yaml_files import read_yaml
from qat.reporting.result import RunResult
from qat.storage import local
from qat.targets import FORMATS

PROMPT = "Once upon a time"
BUILTIN = "pydoc_data.topics"
"""English text that ships with Python."""


def following(result: RunResult) -> list[str]:
    """The commands of `labelled`, for a terminal."""
    return [command for _, command in labelled(result, Path(result.folder))] if result.folder else []


def labelled(result: RunResult, folder: Path) -> list[tuple[str, str]]:
    """(what for, command): generate, evaluate, and llama.cpp or an export; of an interrupted run the one that continues it.

    A classifier writes no text, and has no stock reader: it can be looked at. `folder` is where the run lies now.
    """
    if result.signal is not None or result.status.startswith("interrupted"):
        return [go_on(folder)]
    if not (folder / "packed").is_dir():
        return []
    if result.measured is result.accuracy:
        return [("look at the model", _line("python", "-m", "qat.inspect", str(folder)))]
    return [
        ("generate", _line("python", "-m", "qat.generate", str(folder), "--prompt", PROMPT)),
        ("evaluate", _line("python", "-m", "qat.evaluate", str(folder), "--text", _text(folder))),
        _outside(result, folder),
    ]


def go_on(folder: Path, *settings: str) -> tuple[str, str]:
    """(what for, the command that continues a run), with what is changed."""
    return "train on" if settings else "go on", _line("python", "-m", "qat.train", f"resume={folder}", *settings)


def _outside(result: RunResult, folder: Path) -> tuple[str, str]:
    """The model in another program: llama.cpp where a file for it is there or can be."""
    gguf = folder / FORMATS["gguf"].in_run
    if gguf.is_file():
        return "run in llama.cpp", _line("llama-cli", "-m", str(gguf), "-p", PROMPT)
    skipped = result.export.get("skipped", {})
    name = next(one for one in ("gguf", "pt2", "hf") if one not in skipped)
    return "export", _line("python", "-m", "qat.export", str(folder), "--out", str(folder / FORMATS[name].in_run))


def _text(folder: Path) -> str:
    """The file that the run was validated on, or trained; what ships with Python where neither is a file."""
    try:
        data: Any = read_yaml(folder / "config.yaml").get("data") or {}
    except (OSError, ValueError):
        return BUILTIN
    names = [str(data[key]) for key in ("valid", "train") if data.get(key)]
    return next((str(local(name)) for name in names if data.get("kind") != "chat" and local(name).is_file()), BUILTIN)


def _line(*words: str) -> str:
    return shlex.join(words)
