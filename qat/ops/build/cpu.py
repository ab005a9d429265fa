"""The CPU kernels' library: csrc/cpu, csrc/ops_cpu* and the autograd node, compiled by g++ and ninja at the first use.

One library holds all instruction sets; qat/ops/cpu.py picks at run time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qat.ops.build.store import (
    BuildError,
    build_root,
    content_key,
    digest,
    failure,
    finish,
    fresh,
    is_done,
    locked,
    matching,
    source_folder,
    version_line,
)
from qat.terminal.stage import stage

_NAME = "qat_kernels"
_FLAGS = ["-O3", "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
_SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def sanitizing() -> bool:
    """Whether QAT_SANITIZE asks for the library with AddressSanitizer and UBSan."""
    return os.environ.get("QAT_SANITIZE", "0") not in ("", "0")


def _flags() -> list[str]:
    return _FLAGS + (_SANITIZE if sanitizing() else [])


def sources() -> list[Path]:
    """What is compiled, headers included."""
    return matching(source_folder(), "ops_autograd.cpp", "ops_cpu*.cpp", "ops_cpu*.h", "ops_gradients.h", "cpu/*.cpp", "cpu/*.h")


def compiler() -> tuple[str, str] | None:
    """Path and version line of the compiler, or None."""
    path = shutil.which(os.environ.get("CXX", "g++"))
    return None if path is None else (path, version_line(path, 0))


def _folder() -> tuple[Path, str]:
    """The folder of the current build, and the compiler it is made with. Without one, any build of these sources."""
    content, found = content_key(sources(), _flags()), compiler()
    if found is not None:
        return build_root() / f"{content}-{digest(*found)}", found[1]
    for folder in sorted(build_root().glob(f"{content}-*")):
        if is_done(folder):
            return folder, (folder / "done").read_text()
    wanted = os.environ.get("CXX", "g++")
    raise BuildError(f"no C++ compiler ({wanted} is not found); install g++, or set CXX to one, to have compiled kernels")


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """ninja from pip lies beside python, which is not on PATH when the environment was not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _compile_and_load(folder: Path, version: str) -> None:
    from torch.utils import cpp_extension

    fresh(folder)
    files = [str(file) for file in sources() if file.suffix == ".cpp"]
    link = ["-fsanitize=address,undefined"] if sanitizing() else []
    try:
        with _ninja_on_path(), stage("compiling the CPU kernels, once (about half a minute)"):
            cpp_extension.load(
                _NAME, files, _flags(), extra_ldflags=link, build_directory=str(folder), with_cuda=False, is_python_module=False
            )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise failure(folder / "build.log", str(error)) from error
    finish(folder, version)


def _build(folder: Path, library: Path, version: str) -> None:
    """Compile and load, or load what another process compiled in the meantime."""
    with locked(folder):
        if is_done(folder) and library.exists():
            torch.ops.load_library(library)
        else:
            _compile_and_load(folder, version)


_loaded: list[tuple[Path, str]] = []


def load() -> tuple[Path, str]:
    """Build the library where that is needed, load it into torch, and return its path and its compiler's version.

    Raises:
        BuildError: no compiler, a failed compilation, or a library that does not load.
    """
    if not _loaded:
        folder, version = _folder()
        library = folder / f"{_NAME}.so"
        if is_done(folder) and library.exists():  # it never changes, so a cache that cannot be written serves
            torch.ops.load_library(library)
        else:
            _build(folder, library, version)
        _loaded.append((library, version))
    return _loaded[0]


def build_sanitized() -> dict[str, str]:
    """Build in a process that starts with the sanitizers' runtime; the environment that uses the library.

    Raises:
        BuildError: no compiler, or a failed compilation.
    """
    found = compiler()
    if found is None:
        raise BuildError("no C++ compiler, so nothing to sanitize")
    names = [[found[0], f"-print-file-name=lib{name}.so"] for name in ("asan", "ubsan")]
    runtime = [subprocess.run(name, capture_output=True, text=True, check=True).stdout.strip() for name in names]
    environment = {"LD_PRELOAD": ":".join(runtime), "ASAN_OPTIONS": "detect_leaks=0", "QAT_SANITIZE": "1"}
    code = f"from {__name__} import load; load()"
    if subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=False).returncode:
        raise BuildError("the sanitized build failed")
    return environment
