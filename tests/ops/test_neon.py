"""The NEON path, cross-compiled and run under qemu-user where Debian's g++-aarch64-linux-gnu and qemu-user are installed."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_neon_equals_portable(tmp_path):
    native = platform.machine() in ("aarch64", "arm64")
    compiler = shutil.which("g++" if native else "aarch64-linux-gnu-g++")
    emulator = [] if native else [shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")]
    if compiler is None or None in emulator:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user (Debian packages)")
    program = tmp_path / "neon_check"
    sources = [ROOT / "tests" / "neon_check.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    flags = ["-O2", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-static"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon equals portable" in done.stdout
