"""What can be known about the CUDA library without a GPU: archs, keys, messages, and that nvcc's library loads here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import qat
from qat import ops
from qat.ops import cuda, reference
from qat.ops.build import cpu as build_cpu
from qat.ops.build import cuda as build_cuda
from qat.ops.build import ptxas as resources
from qat.ops.build.store import BuildError, content_key, is_done
from qat.ops.choice import choose
from qat.ops.products.probe import probe

ROOT = Path(qat.__file__).resolve().parent.parent
# Stands for nvcc: notes its arguments, prints what ptxas would, and writes an empty output; or fails as nvcc does.
NVCC = """#!{python}
import os, sys
from pathlib import Path
words = sys.argv[1:]
if "--version" in words:
    print("nvcc: NVIDIA (R) Cuda compiler driver\\nBuild cuda_{version}")
    raise SystemExit
with open("{log}", "a") as log:
    log.write(" ".join(words) + "\\n")
broken = [word for word in words if word.endswith(".cu") and "broken" in Path(word).read_text()]
if broken:
    print(broken[0] + '(1): error: identifier "broken" is undefined')
    raise SystemExit(2)
Path(words[words.index("-o") + 1]).write_text("")
"""


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A fake nvcc that notes its calls, sources of our own, and an empty cache."""
    log, csrc = tmp_path / "calls", tmp_path / "csrc"
    (csrc / "cuda").mkdir(parents=True)
    for name in ("ops_cuda.cpp", "cuda/a.cu", "cuda/b.cu", "cuda/kernels.h"):
        (csrc / name).write_text(f"// {name}")
    monkeypatch.setattr(build_cuda, "source_folder", lambda: csrc)
    monkeypatch.setenv("QAT_BUILD_DIR", str(tmp_path / "build"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "nvcc"

    def install(version: str) -> None:
        tool.write_text(NVCC.format(python=sys.executable, log=log, version=version))
        tool.chmod(0o755)

    install("13.0")
    return SimpleNamespace(
        calls=lambda: log.read_text().splitlines() if log.exists() else [], install=install, csrc=csrc, tool=tool
    )


def test_archs():
    assert build_cuda.check_archs(["90a", "80", "120", "80"]) == ["80", "90a", "120"]
    for bad in ("75", "9.0", "sm_80", "", "90b"):
        with pytest.raises(BuildError, match=f"CUDA arch '{bad}' is not possible; the kernels need 80 or later"):
            build_cuda.check_archs(["80", bad])
    with pytest.raises(BuildError, match="no CUDA arch is given"):
        build_cuda.check_archs([])
    assert [build_cuda.arch_of(c) for c in ((8, 0), (8, 9), (9, 0), (12, 0))] == ["80", "89", "90a", "120"]
    assert build_cuda.serves("80", "80") and build_cuda.serves("80", "89") and build_cuda.serves("90a", "90a")
    for built, wanted in (("89", "80"), ("80", "90a"), ("90", "90a"), ("90a", "100"), ("90a", "120")):
        assert not build_cuda.serves(built, wanted)
    for built, wanted in (("80", "100"), ("100", "120"), ("90", "103")):  # by PTX
        assert build_cuda.serves(built, wanted) and not build_cuda.has_code(built, wanted)


def test_needed_archs(monkeypatch):
    monkeypatch.delenv("QAT_CUDA_ARCHS", raising=False)
    found = [(9, 0), (7, 5), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[index])
    assert build_cuda.needed_archs() == ["86", "90a"]
    found[:] = [(7, 5)]
    assert build_cuda.needed_archs() == build_cuda.ARCHS == ["80", "90a"]
    found.clear()
    assert build_cuda.needed_archs() == build_cuda.ARCHS
    monkeypatch.setenv("QAT_CUDA_ARCHS", "120 89")
    assert build_cuda.needed_archs() == ["89", "120"]


def test_a_gpu_newer_than_nvcc_takes_the_newest_arch_it_knows(monkeypatch):
    monkeypatch.delenv("QAT_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability, known, wanted in (
        ((12, 0), ["75", "80", "89", "90"], "90"),
        ((12, 0), ["80", "90", "100", "120", "121"], "120"),
        ((9, 0), ["80", "90"], "90a"),
        ((8, 6), [], "86"),
        ((13, 0), ["80", "103", "120"], "120"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        monkeypatch.setattr(build_cuda, "known_archs", lambda known=known: known)
        assert build_cuda.needed_archs() == [wanted]
        assert build_cuda.serves(wanted, build_cuda.arch_of(capability))


def test_the_newest_plain_arch_has_ptx(nvcc):
    build_cuda.build(["90a", "80", "86"])
    calls = nvcc.calls()[:-1]
    assert all(call.count("code=compute_") == 1 and "-gencode=arch=compute_86,code=compute_86" in call for call in calls)


def test_ptx_serves_where_nothing_can_be_built(nvcc, monkeypatch):
    library = build_cuda.build(["80", "90a"])
    assert build_cuda._place(["120"], ("nvcc", "another")) != library.parent
    monkeypatch.setattr(build_cuda, "compiler", lambda: None)
    assert build_cuda.build(["120"]) == library


@pytest.mark.parametrize("wrong", ["codes", "y", "image"])
def test_a_library_that_does_not_run_is_found_at_load(monkeypatch, wrong):
    def quantize(x, per_tensor, eps):
        codes, scale = reference.quantize_activation(x, "token", eps)
        if wrong == "image":
            raise RuntimeError("quantize_activation failed: no kernel image is available for execution on the device\nmore")
        return codes + (wrong == "codes"), scale

    def multiply(x, packed, scale, bias, k, per_tensor, eps, overlap):
        return reference.packed_linear(x, packed, scale, bias, k, "2bit", 8, "token", eps) + (wrong == "y")

    fake = SimpleNamespace(cuda_quantize_activation=quantize, cuda_packed_linear=multiply)
    monkeypatch.setattr(torch.ops, "qat", fake)
    message = "no kernel image is available for execution on the device$" if wrong == "image" else "other bits than the reference"
    with pytest.raises(BuildError, match=f"a GPU does not run it: .*{message}"):
        probe(torch.device("cpu"), "a GPU does not run it")


def test_a_build_is_found_again_and_made_anew_when_anything_changes(nvcc):
    library = build_cuda.build(["90a", "80"])
    assert build_cuda.archs_of(library) == ["80", "90a"] and is_done(library.parent)
    compiles, link = nvcc.calls()[:-1], nvcc.calls()[-1]
    assert len(compiles) == 3 and "-shared" in link and "-ltorch" in link
    assert all(
        "-gencode=arch=compute_90a,code=sm_90a" in call and "-gencode=arch=compute_80,code=sm_80" in call for call in compiles
    )
    for archs in (["80", "90a"], ["90a"], ["86"]):  # 80 serves all of its generation
        assert build_cuda.build(archs) == library
    assert len(nvcc.calls()) == 4
    others = {build_cuda.build(["120"])}
    nvcc.install("13.1")
    others.add(build_cuda.build(["80"]))
    (nvcc.csrc / "cuda" / "kernels.h").write_text("// changed")
    others.add(build_cuda.build(["80"]))
    assert len(others | {library}) == 4 and len(nvcc.calls()) == 16
    nvcc.tool.unlink()
    if build_cuda.compiler() is None:  # without nvcc, whatever was built from these sources serves
        assert build_cuda.build(["80"]) in others


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    """A copy of the sources that a test may change."""
    folder = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for module in (build_cpu, build_cuda):
        monkeypatch.setattr(module, "source_folder", lambda: folder)
    return folder


def keys() -> tuple[str, str]:
    return content_key(build_cpu.sources(), []), content_key(build_cuda.sources(), [])


def test_what_exists_for_tests_alone_makes_nobody_recompile(csrc):
    before, emulation = keys(), sorted((csrc / "emulation").iterdir())
    assert len(emulation) >= 5
    for file in emulation:
        file.write_text(file.read_text() + "// a comment\n")
    assert keys() == before


def test_each_source_is_in_the_key_of_its_library(csrc):
    files = {file for file in csrc.rglob("*") if file.is_file() and file.parent.name != "emulation"}
    cpu_files, cuda_files = set(build_cpu.sources()), set(build_cuda.sources())
    assert cpu_files | cuda_files == files and [file.name for file in cpu_files & cuda_files] == ["ops_gradients.h"]
    for file in files:
        before = keys()
        file.write_text(file.read_text() + "// a comment\n")
        changed = [new != old for new, old in zip(keys(), before, strict=True)]
        assert changed == [file in cpu_files, file in cuda_files], file


def test_only_the_bindings_know_torch(csrc):
    knowing = {file.name for file in csrc.rglob("*") if file.is_file() and "torch/" in file.read_text()}
    assert knowing == {"ops_autograd.cpp", "ops_cpu.h", "ops_cuda.h", "ops_gradients.h"}


def test_enumerators_are_those_of_the_kernels():
    header = (ROOT / "csrc" / "cuda" / "kernels.h").read_text()
    enums = {name: names.split(", ") for name, names in re.findall(r"enum class (\w+) : int32_t \{ (.*?) \}", header)}
    assert list(cuda._GRANULARITIES) == enums["Granularity"] and [*cuda._REDUCTIONS, "given"] == enums["Reduce"]
    assert list(cuda._GRANULARITIES.values()) == [0, 1, 2] and [*cuda._REDUCTIONS.values(), cuda._GIVEN] == [0, 1, 2]
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    assert [short[name] for name in cuda._SCALE_DTYPES] == enums["Dtype"] and list(cuda._SCALE_DTYPES.values()) == [0, 1, 2]


def test_a_build_that_was_killed_is_made_again(nvcc):
    library = build_cuda.build(["80"])
    (library.parent / "done").unlink()
    assert build_cuda.build(["80"]) == library and len(nvcc.calls()) == 8


def test_what_nvcc_says_is_the_message(nvcc, monkeypatch):
    (nvcc.csrc / "cuda" / "b.cu").write_text("broken")
    with pytest.raises(
        BuildError, match=r'compiling failed: .*b\.cu\(1\): error: identifier "broken" is undefined \(all of it in .*build\.log\)'
    ):
        build_cuda.build(["80"])
    assert not list(build_cuda.build_root().glob("*/done"))
    monkeypatch.setenv("QAT_BUILD_DIR", "/proc/nowhere")
    with pytest.raises(BuildError, match="set QAT_BUILD_DIR to a folder that can be written"):
        build_cuda.build(["80"])


def test_no_nvcc(nvcc, monkeypatch):
    monkeypatch.setattr(build_cuda, "compiler", lambda: None)
    with pytest.raises(BuildError, match="nvcc is not found.*set CUDA_HOME"):
        build_cuda.build(["80"])


def test_the_command_line(tmp_path):
    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qat.ops.build", *words]
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=300)

    done = run("--check", "--cuda-arch", "75", QAT_BUILD_DIR=str(tmp_path))
    if build_cuda.compiler() is None:
        assert done.returncode == 0 and "nvcc is not found, so the CUDA kernels are not checked here" in done.stdout
    else:
        assert done.returncode == 1 and done.stderr.strip().endswith("the kernels need 80 or later, for example: 80 89 90a 120")
    assert "--cuda-arch" in run("--help").stdout


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_90a'
ptxas info    : Function properties for _Z5firstPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_80'
ptxas info    : Function properties for _Z6secondPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 360 bytes cmem[0]
"""


def test_resources():
    second, first = resources.kernels(LOG)
    assert (second.arch, second.registers, second.stack, second.spills, second.shared) == ("sm_80", 32, 0, 0, 0)
    assert (first.arch, first.registers, first.stack, first.spills, first.shared) == ("sm_90a", 255, 16, 12, 1024)
    assert "second" in second.line() and "255" in first.line()
    (spill,) = resources.complaints(LOG)
    assert "first" in spill and spill.endswith("for sm_90a spills 12 bytes")
    good = LOG[LOG.index("ptxas info    : Compiling entry function '_Z6second") :]
    assert resources.complaints(good) == []
    assert resources.complaints(good + "a.cu(3): warning #177-D: unused") == ["a.cu(3): warning #177-D: unused"]
    assert resources.complaints("") == ["no kernel was compiled"]


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose torch has CUDA and an old GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(cuda, "_states", {})
    monkeypatch.delenv("QAT_KERNELS", raising=False)


def test_an_old_gpu_gives_one_clear_message(gpu, capsys):
    why = "Tesla T4 has compute capability 7.5; the kernels need 8.0 (Ampere) or later"
    assert ops.backend()["cuda"] == {"kernels": "reference", "why": why}
    ops.backend()
    assert capsys.readouterr().err.count(f"qat: reference CUDA kernels: {why}") == 1
    with pytest.raises(ValueError, match="quant.kernels=compiled, but cuda has none: Tesla T4 has compute capability 7.5"):
        ops.check_kernels("compiled", "cuda")
    ops.check_kernels("compiled" if ops.backend()["cpu"]["kernels"] == "compiled" else "auto")  # the CPU's serve


def test_a_library_without_this_gpus_code_says_so(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(build_cuda, "load", lambda archs: tmp_path / "cuda-1-2-80" / "library.so")
    monkeypatch.setattr(cuda, "probe", lambda device, failed: None)
    assert cuda.status().why.endswith("library.so is built for 80, but Tesla T4 needs 90a; name it in QAT_CUDA_ARCHS")
    monkeypatch.setattr(cuda, "_states", {})
    monkeypatch.setattr(build_cuda, "load", lambda archs: tmp_path / "cuda-1-2-80_90a" / "library.so")
    assert cuda.status().kernels == "compiled" and "Tesla T4 (sm_90a)" in cuda.status().why
    monkeypatch.setattr(cuda, "_states", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 0))
    assert "Tesla T4 (sm_120, made from PTX by its driver)" in cuda.status().why


def test_environment_overrides(monkeypatch):
    def fail() -> str:
        raise BuildError("no compiler")

    monkeypatch.setenv("QAT_KERNELS", "reference")
    assert choose("CUDA", fail).why == "QAT_KERNELS=reference"
    monkeypatch.setenv("QAT_KERNELS", "compiled")
    with pytest.raises(RuntimeError, match="QAT_KERNELS=compiled, but there are no compiled CUDA kernels: no compiler"):
        choose("CUDA", fail)
    monkeypatch.setenv("QAT_KERNELS", "fast")
    with pytest.raises(ValueError, match="QAT_KERNELS='fast' is not allowed"):
        choose("CUDA", fail)


def test_the_library_of_nvcc_loads_here():
    """As `make cuda-check` left it: nvcc takes minutes, too long for a test."""
    folder = build_cuda._place(build_cuda.ARCHS, build_cuda.compiler())
    if folder is None or not is_done(folder):
        pytest.skip("not built; `make cuda-check` builds it")
    code = f"import torch; torch.ops.load_library({str(folder / 'qat_kernels_cuda.so')!r})"
    code += "; print(torch.ops.qat.cuda_packed_linear.default._schema)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Tensor? bias, int k, bool per_tensor, float eps, bool overlap) -> Tensor" in done.stdout, done.stderr
