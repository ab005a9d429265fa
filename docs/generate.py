"""Write the pages of docs/ that are made from the code: `python docs/generate.py`.

Each page lies in the repository, so that it can be read where the code is; tests/docs fails where one is not current.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_layout import ROOMS  # noqa: E402

from qat.config import TrainConfig  # noqa: E402
from qat.config.describe import Key, keys, sections  # noqa: E402

NOTE = "<!-- Made by `python docs/generate.py`; edit the code instead. -->\n\n"
VERBS = ("evaluate", "generate", "export", "inspect", "serve", "plan", "bench", "ops.build")


def config_page() -> str:
    """Every key: type, default, meaning."""
    parts = [
        "# Configuration\n",
        NOTE,
        "Every key of `python -m qat.train`, as `key=value` on the command line or in a recipe.\n",
    ]
    for name, section in sections(TrainConfig).items():
        parts.append(f"\n## {name}\n\n{_first_line(section.__doc__)}\n\n{_table(keys(section, f'{name}.'))}")
    rest = [key for key in keys(TrainConfig) if "." not in key.name]
    return "".join([*parts, f"\n## The rest\n\n{_table(rest)}"])


def _table(found: Any) -> str:
    rows = [f"| `{key.name}` | {_type(key.type)} | `{_value(key)}` | {_cell(key.doc)} |" for key in found]
    return "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows, ""])


def _type(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return ", ".join("null" if one is NoneType else _type(one) for one in get_args(kind))
    inner = ", ".join(_type(one) for one in get_args(kind))
    name = {"str": "text", "int": "integer", "float": "number", "bool": "true, false"}.get(kind.__name__, kind.__name__)
    return f"{name} of {inner}" if get_origin(kind) else name


def _value(key: Key) -> str:
    if _plain(key.default):
        return {None: "null", True: "true", False: "false"}.get(key.default, key.default)
    return str(key.default) or '""'


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0]


def commands_page() -> str:
    """`--help` of every verb."""
    parts = ["# Commands\n", NOTE, "`qat VERB ...` and `python -m qat.VERB ...` are the same.\n"]
    for verb in ("train", *VERBS):
        parts.append(f"\n## qat.{verb}\n\n```\n{_help(verb)}\n```\n")
    return "".join(parts)


def _help(verb: str) -> str:
    environment = {**os.environ, "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"qat.{verb}", "--help"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def architecture_page() -> str:
    """The rooms from the bottom up, and the first line of every module."""
    parts = ["# The map\n", NOTE, "Folders of `qat/` from the bottom up: each imports only those above it in this list.\n"]
    for room in ROOMS:
        parts.append(f"\n## {room}\n\n{_docstring(ROOT / 'qat' / room / '__init__.py')}\n\n{_modules(ROOT / 'qat' / room)}")
    verbs = [file for file in sorted((ROOT / "qat").glob("*.py")) if file.name != "__init__.py"]
    return "".join([*parts, "\n## Verbs, and what lies directly in qat/\n\n", _rows(verbs, ROOT / "qat")])


def _modules(folder: Path) -> str:
    files = [file for file in sorted(folder.rglob("*.py")) if file != folder / "__init__.py" and file.read_text().strip()]
    return _rows(files, folder)


def _rows(files: list[Path], folder: Path) -> str:
    rows = [
        f"| `{file.relative_to(folder).as_posix().replace('/__init__.py', '/')}` | {_cell(_docstring(file))} |" for file in files
    ]
    return "\n".join(["| file | |", "|---|---|", *rows, ""]) if rows else ""


def _docstring(file: Path) -> str:
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(doc.partition("\n\n")[0].split())


PAGES: dict[str, Callable[[], str]] = {
    "reference/config.md": config_page,
    "reference/commands.md": commands_page,
    "internals/architecture.md": architecture_page,
}
"""Page -> what makes it. The table of architectures is made by its test: tests/architectures.py."""


def main() -> None:
    for name, make in PAGES.items():
        (ROOT / "docs" / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
