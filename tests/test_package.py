"""The wheel holds what it must and nothing that is for tests, and it works where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.specifiers import SpecifierSet

from qat.ops.build import cpu, cuda
from qat.ops.build.store import content_key

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("qat", "conf", "recipes", "csrc")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", *words, "--no-deps", "-q", "--disable-pip-version-check", "--no-index"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as setuptools leaves its files among the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    pip("wheel", "--no-build-isolation", "-w", str(folder), str(folder / "source"))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder for PYTHONPATH, beside nothing of ours."""
    target = wheel.parent / "target"
    pip("install", "--target", str(target), str(wheel))
    return target


def run(installed: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=installed.parent, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts}


def test_the_wheel_has_every_file_but_the_emulation(wheel: Path) -> None:
    expected = {f"qat/{name}" for name in files(ROOT / "qat")}
    expected |= {f"qat/{part}/{name}" for part in PARTS[1:] for name in files(ROOT / part) if not name.startswith("emulation/")}
    found = {name for name in ZipFile(wheel).namelist() if name.startswith("qat/")}
    assert found == expected
    assert {"qat/py.typed", "qat/conf/train.yaml", "qat/csrc/cpu/decode.cpp", "qat/recipes/quickstart.yaml"} <= found


def test_the_installed_wheel_trains_nothing_but_says_how(installed: Path) -> None:
    said = run(installed, "-m", "qat.train", "--help")
    assert "quickstart" in said and "recipe=NAME" in said
    assert run(installed, str(installed / "bin" / "qat"), "train", "--help") == said
    composed = run(installed, str(installed / "bin" / "qat"), "train", "recipe=stories260k", "model.path=m", "--cfg", "job")
    assert "max_steps: 3120" in composed


CONVERT = """
import torch, qat
from qat.ops.build import cpu, cuda
from qat.ops.build.store import content_key
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
print(qat.convert(model, qat.QuantConfig()).summary())
x = torch.randn(3, 64)
with torch.inference_mode():
    trained = model(x)
    qat.pack(model)
    print(qat.__file__, torch.equal(model(x), trained), type(model[0]).__name__)
print(*(content_key(library.sources(), []) for library in (cpu, cuda)))
"""


def test_the_installed_wheel_converts_and_packs_with_the_same_kernels(installed: Path) -> None:
    """The key of its sources is the checkout's, so what is compiled for one serves the other."""
    summary, packed, keys = run(installed, "-c", CONVERT).strip().splitlines()
    assert "2 of 2 linear layers converted" in summary
    assert packed == f"{installed / 'qat' / '__init__.py'} True PackedBitLinear"
    assert keys.split() == [content_key(library.sources(), []) for library in (cpu, cuda)]


def test_versions_are_named_once_and_agree() -> None:
    import qat

    changes = (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["version"] == qat.__version__ and f"## [{qat.__version__}]" in changes
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    lower = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    for requirement in PROJECT["dependencies"]:
        name, _, least = requirement.partition(">=")
        floor, pin = ([int(part) for part in text.split(",")[0].split(".") if part.isdigit()] for text in (least, lower[name]))
        assert pin >= floor, requirement


def test_the_image_copies_what_there_is_and_runs_as_an_ordinary_user() -> None:
    """`make lint` has the Dockerfile's language checked; here what it names."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    copied = [source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]]
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert set(PARTS) <= set(copied) and all((ROOT / source).exists() and f"!{source}" in kept for source in copied)
    assert [rest for word, rest in steps if word == "USER"] == ["1000"] and dict(steps)["ENTRYPOINT"] == '["qat"]'
    torch_pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert any(torch_pin in rest for word, rest in steps if word == "RUN")


def test_pins_install_on_the_oldest_python() -> None:
    """A pin that needs a later 3.11 than a distribution has is no error in pip: it looks for a way around it for hours."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    there = {one.name.lower().replace("_", "-"): one for one in distributions()}
    found = {name: there[key] for name in pins if (key := name.lower().replace("_", "-")) in there}
    needs = {
        name: "".join(one.metadata.get_all("Requires-Python") or ()) for name, one in found.items() if one.version == pins[name]
    }
    assert len(needs) > 30 and [name for name, needed in needs.items() if oldest not in SpecifierSet(needed)] == []
