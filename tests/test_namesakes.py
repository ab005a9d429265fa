"""Other distributions with the import name `qat`: named in one line where ours is imported, and where theirs is instead."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qat
from qat import namesakes

SOURCE = Path(qat.__file__).parent


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages with what `import qat` needs of ours."""
    (tmp_path / "qat").mkdir()
    for name in ("__init__.py", "__main__.py", "namesakes.py", "registration.py"):
        shutil.copy(SOURCE / name, tmp_path / "qat" / name)
    record(tmp_path, "qat_bitlinear-0.1.0", "qat/__init__.py")
    return tmp_path


def record(site: Path, name: str, *files: str) -> None:
    (site / f"{name}.dist-info").mkdir()
    (site / f"{name}.dist-info" / "RECORD").write_text("".join(f"{file},sha256=0,1\n" for file in files))


def run(site: Path, *words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *([path] if path else [])])}
    return subprocess.run([sys.executable, "-S", *words], capture_output=True, text=True, env=environment, cwd="/", check=False)


def test_ours_alone_says_nothing(site: Path) -> None:
    record(site, "qatools-1.0", "qatools/__init__.py")
    done = run(site, "-c", "import qat; print(qat.__file__)")
    assert done.stdout.startswith(str(site)) and done.stderr == ""


@pytest.mark.parametrize(("name", "file"), [("qat-1.8.1", "qat/qat.py"), ("qat_core-1.9.2", "qat/core/console.py")])
def test_files_of_another_in_our_folder(site: Path, name: str, file: str) -> None:
    record(site, name, "../bin/x", file)
    words = name.replace("-", " ")
    expected = f"qat: {words} has the import name qat too; keep it and qat-bitlinear in separate environments\n"
    assert run(site, "-c", "import qat; import qat").stderr == expected


def test_another_behind_ours(site: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "qat").mkdir()
    (other / "qat" / "__init__.py").write_text("")
    assert run(site, "-c", "import qat", path=str(other)).stderr.startswith(f"qat: {other}/qat has the import name qat too; ")
    shutil.copy(SOURCE / "namesakes.py", other / "qat")  # a second copy of ours
    assert run(site, "-c", "import qat", path=str(other)).stderr == ""


def test_another_that_overwrote_ours(site: Path) -> None:
    (site / "qat" / "__init__.py").write_text("version = '1.8.1'")
    done = run(site, "-m", "qat", "train")
    message = f"qat: {site}/qat/__init__.py is another distribution's, which hides or overwrote qat-bitlinear's\n"
    assert done.returncode == 2 and done.stderr == message


def test_the_look_costs_nothing() -> None:
    start = time.perf_counter()
    for _ in range(10):
        namesakes.warn()
    assert (time.perf_counter() - start) / 10 < 0.02
