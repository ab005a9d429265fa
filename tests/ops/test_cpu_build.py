"""Which CPU kernels a process takes and why, and builds that are missing, killed or made twice at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import qat
from qat.ops import cpu
from qat.ops.build import cpu as build_cpu

if not cpu.compiled():
    pytest.skip(f"no compiled kernels: {cpu.status().why}", allow_module_level=True)

ROOT = str(Path(qat.__file__).parent.parent)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": ROOT, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300, check=False)


CALL = "import torch, qat.ops as o; p = o.pack_ternary(torch.ones(4, 8, dtype=torch.int8)); "
CALL += "print(o.packed_linear(torch.ones(1, 8), p, torch.ones(1, 1), in_features=8).tolist(), o.backend()['cpu']['kernels'])"


def test_forced_path_and_message():
    done = run(CALL, QAT_CPU_ISA="portable")
    assert "compiled" in done.stdout and done.stderr.count("qat: compiled CPU kernels: portable") == 1


def test_unknown_path():
    assert "choose one of portable" in run(CALL, QAT_CPU_ISA="sse9").stderr


def test_reference_by_environment():
    done = run(CALL, QAT_KERNELS="reference")
    assert done.stdout.startswith("[[8.0") and "reference" in done.stdout and "QAT_KERNELS=reference" in done.stderr


def test_no_compiler(tmp_path):
    options = {"CXX": "/nowhere/g++", "QAT_BUILD_DIR": str(tmp_path)}
    done = run(CALL, **options)
    assert done.stdout.startswith("[[8.0") and "reference" in done.stdout and "no C++ compiler" in done.stderr
    layer = "import qat; qat.BitLinear(8, 8, config=qat.QuantConfig(kernels='compiled'))"
    assert "quant.kernels=compiled, but cpu has none: no C++ compiler" in run(layer, **options).stderr
    built = subprocess.run(
        [sys.executable, "-m", "qat.ops.build"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "PYTHONPATH": ROOT, "QAT_BUILD_DIR": str(tmp_path)},
    )
    assert built.returncode == 1 and built.stderr.startswith("qat: no compiled kernels: no C++ compiler")


def test_two_processes_and_a_killed_build(tmp_path):
    """A build killed half way leaves a folder without `done` and torch's lock file; two processes then build at once."""
    environment = {**os.environ, "PYTHONPATH": ROOT, "QAT_BUILD_DIR": str(tmp_path), "OMP_WAIT_POLICY": "passive"}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CALL],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    killed = start()
    while not list(tmp_path.glob("*/lock")) and killed.poll() is None:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list(tmp_path.glob("*/lock")) and not list(tmp_path.glob("*/done"))
    outputs = [process.communicate(timeout=600) for process in [start(), start()]]
    assert all(out.startswith("[[8.0") and "compiled" in out for out, _ in outputs)
    assert sum("compiling" in err for _, err in outputs) == 1 and len(list(tmp_path.glob("*/done"))) == 1


def test_a_finished_build_needs_no_lock(tmp_path):
    """A cache made ahead (an image of a container) may belong to somebody else."""
    library, _ = build_cpu.load()
    shutil.copytree(library.parent, tmp_path / library.parent.name)
    refused = "import qat.ops.build.store as s, qat.ops.build.cpu as b\ndef locked(folder): raise s.BuildError('a lock')\n"
    done = run(f"{refused}b.locked = locked\n{CALL}", QAT_BUILD_DIR=str(tmp_path))
    assert done.stdout.startswith("[[8.0") and "compiled" in done.stdout, done.stderr
    shutil.rmtree(tmp_path / library.parent.name)
    assert "a lock" in run(f"{refused}b.locked = locked\n{CALL}", QAT_BUILD_DIR=str(tmp_path)).stderr


def test_building_ahead_where_torch_has_cuda_and_nothing_else_has(tmp_path):
    """As in an image without nvcc: the CPU's kernels are built, and it is said that the GPU's are not."""
    code = "import sys, torch; torch.version.cuda = '13.0'; from qat.ops.build import __main__ as m, cuda; "
    code += "cuda.compiler = lambda: None; sys.argv[1:] = []; m.main()"
    done = run(code)
    assert done.returncode == 0 and "nvcc is not found, so GPUs run the reference" in done.stdout, done.stderr
    assert "ISA" in done.stdout


def test_the_sanitized_build_loads_what_it_builds(monkeypatch):
    """In a process that starts with the sanitizers' runtime; the build itself takes a minute, so it is not made here."""
    asked = []

    def run_(command, **options):
        asked.append(command)
        return SimpleNamespace(stdout="lib.so", returncode=0)

    monkeypatch.setattr(build_cpu, "compiler", lambda: ("g++", "1"))
    monkeypatch.setattr(build_cpu.subprocess, "run", run_)
    assert build_cpu.build_sanitized()["QAT_SANITIZE"] == "1"
    code = asked[-1][-1].replace("load()", "print(load.__name__)")
    monkeypatch.undo()
    assert run(code).stdout == "load\n"


def test_importing_is_lazy():
    assert run("import qat.ops", CXX="/nowhere/g++").stderr == ""
