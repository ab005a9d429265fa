"""The house stays as it was drawn: imports point down, verbs stay thin, the heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [
    "storage",
    "parallel",
    "terminal",
    "targets",
    "tasks",
    "quantizers",
    "config",
    "ops",
    "nn",
    "conversion",
    "calibration",
    "losses",
    "metrics",
    "inference",
    "formats",
    "models",
    "data",
    "evaluation",
    "monitor",
    "generation",
    "serving",
    "planning",
    "reporting",
    "training",
    "bench",
    "export",
]
"""The folders of qat/ from the bottom up. What lies directly in qat/ are verbs, above them all; `export/` holds old names."""
VERBS = (
    "__main__",
    "train",
    "plan",
    "dashboard",
    "evaluate",
    "generate",
    "inspect",
    "serve",
    "report",
    "damage",
    "export.__main__",
    "bench.__main__",
)
BELOW_ALL = ("", "registration", "namesakes")
FILES = sorted((ROOT / "qat").rglob("*.py"))
NATIVE = sorted(file for room in ("csrc", "tests") for file in (ROOT / room).rglob("*") if file.suffix in (".cpp", ".cu", ".h"))
"""C++ and CUDA; a generated table would be left out here, and there is none."""
MOST_LINES = 300
MOST_FILES = 12
ONLY_IN = {
    "hydra": ("config.compose", "train", "training.plugins", "training.loggers"),
    "omegaconf": ("config.compose",),
    "lightning": ("training", "data"),
    "transformers": (
        "models",
        "formats",
        "data",
        "inference",
        "generation",
        "evaluation",
        "serving",
        "registration",
        "training",
        "bench",
        *VERBS,
    ),
    "gguf": ("models", "formats", "evaluation"),
    "safetensors": ("models", "formats"),
}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT / "qat").with_suffix("").parts).removesuffix("__init__").rstrip(".")


def level(name: str) -> int | None:
    """How high a module lies; None: no room has it."""
    room = name.partition(".")[0]
    if name in BELOW_ALL:
        return -1
    if room in ROOMS:
        return len(ROOMS) if name in VERBS else ROOMS.index(room)
    return len(ROOMS) if name in VERBS else None


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(file: Path) -> set[str]:
    """The modules of qat that a file imports, below `qat.`."""
    modules = {module_name(one) for one in FILES}
    found = set()
    for target in imported(file):
        parts = target.split(".")[1:] if target.startswith("qat.") else []
        found |= {name for n in (len(parts), len(parts) - 1) if (name := ".".join(parts[:n])) in modules and name}
    return found


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_down(file: Path) -> None:
    name = module_name(file)
    place = level(name)
    assert place is not None, f"{name} lies in no room; verbs and rooms are listed in this test"
    for other in ours(file) - {name}:
        there = level(other)
        assert there is not None and (place == -1 or there <= place), f"{name} imports {other}, which lies above it"
        assert name not in VERBS or other not in VERBS, f"the verb {name} imports the verb {other}"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_heavy_libraries_stay_home(file: Path) -> None:
    name = module_name(file)
    for target in imported(file):
        allowed = ONLY_IN.get(target.partition(".")[0])
        assert allowed is None or any(name == room or name.startswith(room + ".") for room in allowed), f"{name} imports {target}"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_stay_small(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("file", NATIVE, ids=lambda file: file.name)
def test_native_files_stay_small(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("folder", sorted({file.parent for file in FILES}), ids=lambda folder: folder.name)
def test_folders_stay_small(folder: Path) -> None:
    assert len([file for file in folder.glob("*.py") if file.name != "__init__.py"]) <= MOST_FILES


def test_import_qat_loads_neither_torch_nor_hydra() -> None:
    heavy = ["torch", "hydra", "lightning", "transformers"]
    code = f"import sys, qat, qat.train, qat.config; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by name alone: of two with one name it refuses the second, and all of its tests."""
    names = Counter(file.name for file in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
