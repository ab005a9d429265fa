"""Pages that are made from the code are current, and each private name of other libraries that we use is on its page."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
UPSTREAM = re.findall(r"^\| `([\w.]+)`", (ROOT / "docs/internals/upstream.md").read_text(encoding="utf-8"), flags=re.M)
LIBRARIES = ("torch", "transformers", "lightning", "hydra", "omegaconf", "safetensors", "tokenizers", "jinja2", "datasets")


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == PAGES[name](), "run: python docs/generate.py"


@pytest.mark.parametrize("name", UPSTREAM)
def test_the_name_is_still_there(name: str) -> None:
    parts = name.split(".")
    if importlib.util.find_spec(parts[0]) is None:
        pytest.skip(f"{parts[0]} is not installed")
    found: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(parts[:i]))


def _private(file: Path) -> Iterator[str]:
    """Dotted names of other libraries with a private part, imported or used."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            parts = name.split(".")
            if parts[0] in LIBRARIES and any(re.match(r"_[a-z_]*[a-zA-Z]", part) for part in parts) and "__" not in name:
                yield name


def test_no_private_name_is_missing_from_the_page() -> None:
    used = {name for file in (ROOT / "qat").rglob("*.py") for name in _private(file)}
    assert used, "the search finds nothing"
    missing = {
        name for name in used if not any(known.startswith(name) or name.endswith(known) or known == name for known in UPSTREAM)
    }
    assert missing == set()


def test_the_files_of_the_trips_are_there() -> None:
    text = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:qat|tests|csrc|conf|docs)/[\w/.]+)`", text)
    assert len(named) > 15
    places = [ROOT / name for name in named]
    missing = [place for place in places if not (place.exists() or (place.stem in ("NEW", "FAMILY") and place.parent.is_dir()))]
    assert missing == []
