"""Which CPU kernels a process takes and why, and builds that are missing, killed or made twice at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qat
from qat.ops import cpu

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
    outputs = [process.communicate(timeout=200) for process in [start(), start()]]
    assert all(out.startswith("[[8.0") and "compiled" in out for out, _ in outputs)
    assert sum("compiling" in err for _, err in outputs) == 1 and len(list(tmp_path.glob("*/done"))) == 1


def test_importing_is_lazy():
    assert run("import qat.ops", CXX="/nowhere/g++").stderr == ""
