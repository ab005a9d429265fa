"""The CUDA kernels' library: csrc/cuda and csrc/ops_cuda*, compiled by nvcc alone.

It is a library of its own, so that who has no GPU never waits for nvcc. Nothing asks for a GPU or for a torch with CUDA:
cudart is linked statically, and torch's current stream, the one symbol that only such a torch has, is a weak one. So the
same commands compile, link and load it beside a CPU torch, which is how `python -m qat.ops.build --check` proves it.

    for the GPUs that are visible               load(needed_archs())
    ahead, for any machine of these kinds       build(["80", "90a"])
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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

ARCHS = ["80", "90a"]
"""What is built where no GPU is visible: Ampere (it serves all of 8.x) and Hopper with its own matrix instructions."""
LEAST = (8, 0)
"""The least compute capability the kernels run on."""
_NAME = "qat_kernels_cuda"
_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
_WARNINGS = ["-Xcompiler=-fPIC,-Wall,-Wextra", "-Xptxas=-v"]


def check_archs(archs: Sequence[str]) -> list[str]:
    """The archs in a fixed order, each once.

    Raises:
        BuildError: none, or one that is no arch or older than the kernels need.
    """
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80:
            raise BuildError(f"CUDA arch {arch!r} is not possible; the kernels need 80 or later, for example: 80 89 90a 120")
    if not archs:
        raise BuildError(f"no CUDA arch is given; for example: {' '.join(ARCHS)}")
    return sorted(set(archs), key=lambda arch: (int(arch.rstrip("af")), arch))


def arch_of(capability: tuple[int, int]) -> str:
    """The arch to compile for a compute capability: "80", "89", "90a" (wgmma is not in plain "90")."""
    return f"{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")


def has_code(built: str, wanted: str) -> bool:
    """Whether code for the arch `built` runs on an arch `wanted` as it is: the same, or an earlier of its generation."""
    if not (built.isdigit() and wanted.isdigit()):
        return built == wanted
    return int(built) // 10 == int(wanted) // 10 and int(built) <= int(wanted)


def serves(built: str, wanted: str) -> bool:
    """Whether an arch `wanted` should run what was built for `built`: its code, or its PTX where that is older.

    The driver makes code from PTX at the first load. Not for 9.0, which would lose its own matrix instructions.
    """
    return has_code(built, wanted) or (built.isdigit() and wanted.isdigit() and int(built) < int(wanted))


def needed_archs() -> list[str]:
    """$QAT_CUDA_ARCHS, or those of the visible GPUs that can run the kernels, or ARCHS where none is visible.

    Of a GPU that is newer than nvcc it is the newest that nvcc knows: its PTX serves.
    """
    if os.environ.get("QAT_CUDA_ARCHS"):
        return check_archs(os.environ["QAT_CUDA_ARCHS"].split())
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    known = known_archs()
    return check_archs([_possible(arch_of(one), known) for one in found if one >= LEAST] or ARCHS)


def known_archs() -> list[str]:
    """The plain archs that nvcc compiles for; none where it is not there or does not say."""
    found = compiler()
    code, said = _run([found[0], "--list-gpu-arch"]) if found else (1, "")
    return re.findall(r"compute_(\d+)\b", said) if code == 0 else []


def _possible(arch: str, known: list[str]) -> str:
    plain = arch.rstrip("af")
    earlier = [one for one in known if LEAST[0] * 10 <= int(one) < int(plain)]
    return arch if not known or plain in known or not earlier else max(earlier, key=int)


def compiler() -> tuple[str, str] | None:
    """nvcc's path and its version, or None. Looked for in $CUDA_HOME, on PATH and in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for place in ([Path(home) / "bin"] if home else []) + [None, Path("/usr/local/cuda/bin")]:
        path = shutil.which("nvcc", path=None if place is None else str(place))
        if path is not None:
            return path, version_line(path, -1)
    return None


def archs_of(library: Path) -> list[str]:
    """The archs a library was built for."""
    return library.parent.name.rpartition("-")[2].split("_")


def sources() -> list[Path]:
    """What is compiled, headers included."""
    return matching(source_folder(), "ops_cuda*.cpp", "ops_cuda*.h", "ops_gradients.h", "cuda/*.cu", "cuda/*.h")


def _torch_folder() -> Path:
    return Path(torch.__file__).parent


def _compile_command(nvcc: str, source: Path, archs: Sequence[str], out: Path) -> list[str]:
    torch_headers = [f"-isystem={_torch_folder() / 'include'}"] if source.suffix == ".cpp" else []
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    plain = [arch for arch in archs if arch.isdigit()]
    if plain:  # PTX for newer cards than any of them
        targets.append(f"-gencode=arch=compute_{plain[-1]},code=compute_{plain[-1]}")
    return [nvcc, "-c", str(source), "-o", str(out), *_FLAGS, *_WARNINGS, *torch_headers, *targets]


def _link_command(nvcc: str, objects: Sequence[Path], out: Path) -> list[str]:
    """torch's libraries are in memory when this one is loaded; naming them lets the loader look into them."""
    folder = _torch_folder() / "lib"
    cuda = ["-ltorch_cuda"] if (folder / "libtorch_cuda.so").exists() else []
    linker = ["-Xlinker=--no-as-needed,-z,defs", f"-L{folder}", "-lc10", "-ltorch_cpu", "-ltorch", *cuda]
    return [nvcc, "-shared", "-o", str(out), *map(str, objects), *linker]


def _run(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def _compile(folder: Path, found: tuple[str, str], archs: list[str]) -> None:
    """Compile and link into `folder`; what the compilers said is in its build.log."""
    nvcc, version = found
    fresh(folder)
    named = ", ".join(f"sm_{arch}" for arch in archs)
    files = [file for file in sources() if file.suffix in (".cpp", ".cu")]
    objects = [folder / f"{file.stem}.o" for file in files]
    commands = [_compile_command(nvcc, file, archs, out) for file, out in zip(files, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool, stage(f"compiling the CUDA kernels for {named}, once (a few minutes)"):
        done = list(pool.map(_run, commands))
    if not any(code for code, _ in done):
        done.append(_run(_link_command(nvcc, objects, folder / f"{_NAME}.so")))
    output = "".join(text for _, text in done)
    if any(code for code, _ in done):
        failed = "".join(text for code, text in done if code)
        raise failure(folder / "build.log", failed)
    (folder / "build.log").write_text(output)
    for file in objects:
        file.unlink()
    finish(folder, version)


def _place(archs: list[str], found: tuple[str, str] | None) -> Path | None:
    """The folder of a finished build that serves the archs, or else the one to build in; None if there is neither.

    PTX serves where nothing can be built.
    """
    content = content_key(sources(), _FLAGS)
    prefix = f"cuda-{content}-{digest(*found) if found else '*'}-"
    for fits in [has_code] if found else [has_code, serves]:
        for folder in sorted(build_root().glob(f"{prefix}*")):
            built = archs_of(folder / _NAME)
            if is_done(folder) and all(any(fits(one, arch) for one in built) for arch in archs):
                return folder
    return build_root() / f"{prefix}{'_'.join(archs)}" if found else None


def build(archs: Sequence[str]) -> Path:
    """The library with code for these archs, compiled now if it was not before.

    Raises:
        BuildError: no nvcc, an impossible arch, or a failed compilation.
    """
    archs, found = check_archs(archs), compiler()
    folder = _place(archs, found)
    if folder is None:
        raise BuildError(
            "nvcc is not found ($CUDA_HOME, PATH, /usr/local/cuda); install the CUDA toolkit, or set CUDA_HOME,"
            " to have compiled CUDA kernels"
        )
    if not is_done(folder):
        assert found is not None
        with locked(folder):
            if not is_done(folder):
                _compile(folder, found, archs)
    return folder / f"{_NAME}.so"


_loaded: list[Path] = []


def load(archs: Sequence[str]) -> Path:
    """Build the library where that is needed, load it into torch, and return its path.

    Raises:
        BuildError: as `build`, or a library that does not load.
    """
    if not _loaded:
        library = build(archs)
        try:
            torch.ops.load_library(library)
        except OSError as error:
            raise BuildError(f"{library} does not load: {error}") from error
        _loaded.append(library)
    return _loaded[0]
