"""The house stays as it was drawn: imports point down, files stay small, the heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = """quantizers config ops nn conversion losses metrics formats models inference data evaluation reporting
training bench""".split()
"""The rooms of qat/, from the bottom up. What lies directly in qat/ are the verbs, above them all."""
FILES = sorted((ROOT / "qat").rglob("*.py"))
ONE_PER_VERB = ("train", "evaluate", "generate", "export", "inspect", "serve", "bench")
ONLY_IN = {
    "hydra": ("config", "train"),
    "omegaconf": ("config", "train", "runs"),
    "lightning": ("module", "callbacks", "fit", "data", "train", "runs"),
}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT / "qat").with_suffix("").parts)


def home(name: str) -> str | None:
    """The longest entry of LAYERS that `name` lies in."""
    found = [key for key in HOME if name == key or name.startswith(key + ".")]
    return max(found, key=len, default=None)


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_down(file: Path) -> None:
    name = module_name(file)
    if name == "__init__":
        return
    place = home(name)
    assert place is not None, f"{name} has no layer; give it one in this test and in the README's file map"
    for target in imported(file):
        if target.startswith("qat.") and (other := home(target.removeprefix("qat."))):
            assert HOME[other] <= HOME[place], f"{name} (layer {HOME[place]}) imports {target} (layer {HOME[other]})"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_heavy_libraries_stay_home(file: Path) -> None:
    name = module_name(file)
    for target in imported(file):
        allowed = ONLY_IN.get(target.partition(".")[0])
        assert allowed is None or home(name) in allowed, f"{name} imports {target}"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_stay_small(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 480


def test_import_qat_loads_neither_torch_nor_hydra() -> None:
    heavy = ["torch", "hydra", "lightning", "transformers"]
    code = f"import sys, qat, qat.train, qat.config; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
