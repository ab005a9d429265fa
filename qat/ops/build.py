"""Compiles csrc/ once and loads it: `python -m qat.ops.build` does it ahead and prints what was built, and where.

`--sanitize` builds with AddressSanitizer and UBSan and prints the environment that uses it:
    env $(python -m qat.ops.build --sanitize) python -m pytest tests/test_kernels.py -k "not TestChoice and not fullgraph"

The library lies in $QAT_BUILD_DIR (~/.cache/qat/build) in a folder named after the content of the sources, torch's
version, the machine and the compiler, so nothing stale is ever loaded. A file lock of the operating system guards the
build: it ends with the process that holds it (torch's own lock file outlives a killed build for ever), and a folder
counts only once its `done` file is there. One library holds all instruction sets; qat/ops/cpu.py picks at run time.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_NAME = "qat_kernels"
_FLAGS = ["-O3", "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
_SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the message is one line for users."""


def source_folder() -> Path:
    """csrc: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"the folder csrc is missing beside {package}; the installation is incomplete")


def build_root() -> Path:
    """Where built libraries are kept."""
    return Path(os.environ.get("QAT_BUILD_DIR") or Path.home() / ".cache" / "qat" / "build")


def sanitizing() -> bool:
    """Whether QAT_SANITIZE asks for the library with AddressSanitizer and UBSan."""
    return os.environ.get("QAT_SANITIZE", "0") not in ("", "0")


def _flags() -> list[str]:
    return _FLAGS + (_SANITIZE if sanitizing() else [])


def _files() -> list[Path]:
    folder = source_folder()
    return [folder / "ops.cpp", *sorted(folder.glob("cpu/*.cpp")), *sorted(folder.glob("cpu/*.h"))]


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _content_key() -> str:
    files = [part for file in _files() for part in (file.name.encode(), file.read_bytes())]
    return _digest(torch.__version__.encode(), platform.machine().encode(), *(flag.encode() for flag in _flags()), *files)


def _compiler() -> tuple[str, str] | None:
    """Path and version line of the compiler, or None."""
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return path, (done.stdout.splitlines() or ["unknown"])[0]


def _folder() -> tuple[Path, str]:
    """The folder of the current build, and the compiler it is made with. Without one, any build of these sources."""
    content, compiler = _content_key(), _compiler()
    if compiler is not None:
        return build_root() / f"{content}-{_digest(*(part.encode() for part in compiler))}", compiler[1]
    for folder in sorted(build_root().glob(f"{content}-*")):
        if (folder / "done").exists():
            return folder, (folder / "done").read_text()
    wanted = os.environ.get("CXX", "g++")
    raise BuildError(f"no C++ compiler ({wanted} is not found); install g++, or set CXX to one, to have compiled kernels")


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """ninja from pip lies beside python, which is not on PATH when the environment was not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _compile_and_load(folder: Path, compiler: str) -> None:
    from torch.utils import cpp_extension

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print("qat: compiling the CPU kernels, once (about half a minute) ...", file=sys.stderr, flush=True)
    sources = [str(file) for file in _files() if file.suffix == ".cpp"]
    link = ["-fsanitize=address,undefined"] if sanitizing() else []
    try:
        with _ninja_on_path():
            cpp_extension.load(
                _NAME, sources, _flags(), extra_ldflags=link, build_directory=str(folder), with_cuda=False, is_python_module=False
            )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        log = folder / "build.log"
        log.write_text(str(error))
        reason = next((line for line in str(error).splitlines() if "error:" in line.lower()), str(error).partition("\n")[0])
        raise BuildError(f"compiling failed: {reason.strip()[:300]} (all of it in {log})") from error
    (folder / "done").write_text(compiler)


_loaded: list[Path] = []


def load() -> Path:
    """Build the library where that is needed, load it into torch, and return its path.

    Raises:
        BuildError: no compiler, a failed compilation, or a library that does not load.
    """
    if _loaded:
        return _loaded[0]
    folder, compiler = _folder()
    library = folder / f"{_NAME}.so"
    try:
        build_root().mkdir(parents=True, exist_ok=True)
        with _locked(build_root() / f"{folder.name}.lock"):
            if (folder / "done").exists() and library.exists():
                torch.ops.load_library(library)
            else:
                _compile_and_load(folder, compiler)
    except OSError as error:
        raise BuildError(f"cannot use {folder}: {error}; set QAT_BUILD_DIR to a folder that can be written") from error
    _loaded.append(library)
    return library


def main() -> None:
    """Build ahead of the first use."""
    parser = argparse.ArgumentParser(prog="python -m qat.ops.build", description=main.__doc__)
    parser.add_argument(
        "--sanitize", action="store_true", help="build with AddressSanitizer and UBSan (used where QAT_SANITIZE=1)"
    )
    if parser.parse_args().sanitize:
        _build_sanitized()
        return
    from qat.ops import cpu

    try:
        library = load()
        path = cpu.start_isa()
    except BuildError as error:
        raise SystemExit(f"qat: no compiled kernels: {error}") from None
    sources = " ".join(file.name for file in _files() if file.suffix == ".cpp")
    print(f"compiled  {sources}")
    print(f"with      {_folder()[1]}, torch {torch.__version__}")
    print(f"ISA       {path} of {', '.join(cpu.paths())}")
    print(f"library   {library}")


def _build_sanitized() -> None:
    """Build in a process that starts with the sanitizers' runtime, and print the environment that uses the library."""
    compiler = _compiler()
    if compiler is None:
        raise SystemExit("qat: no C++ compiler, so nothing to sanitize")
    names = [[compiler[0], f"-print-file-name=lib{name}.so"] for name in ("asan", "ubsan")]
    runtime = [subprocess.run(name, capture_output=True, text=True, check=True).stdout.strip() for name in names]
    environment = {"LD_PRELOAD": ":".join(runtime), "ASAN_OPTIONS": "detect_leaks=0", "QAT_SANITIZE": "1"}
    code = "from qat.ops import build; build.load()"
    if subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=False).returncode:
        raise SystemExit("qat: the sanitized build failed")
    print(" ".join(f"{key}={value}" for key, value in environment.items()))


if __name__ == "__main__":
    main()
