"""`python -m qat.ops.build`: compile the kernels ahead of the first use, and print what was built, and where.

python -m qat.ops.build                                 for this machine: CPU, and CUDA where torch and nvcc have it
python -m qat.ops.build --cuda-arch native              CUDA alone, for the GPUs of this machine
python -m qat.ops.build --cuda-arch 80 90a              CUDA alone, for these GPUs, wherever nvcc is
python -m qat.ops.build --cuda-arch 80 90a --check      registers and loops; fails on a spill, a warning or a gate
env $(python -m qat.ops.build --sanitize) python -m pytest ...    as `make sanitize` does; with --capture=sys, or a report is lost
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qat.ops.build import cpu as build_cpu
from qat.ops.build import cuda as build_cuda
from qat.ops.build import gates, sass
from qat.ops.build import ptxas as resources
from qat.ops.build.store import BuildError


def _print(**facts: str) -> None:
    for name, fact in facts.items():
        print(f"{name:10}{fact}")


def _build_cpu() -> None:
    from qat.ops import cpu

    library, version = build_cpu.load()
    path = cpu.start_isa()
    _print(
        compiled=" ".join(file.name for file in build_cpu.sources() if file.suffix == ".cpp"),
        library=str(library),
        ISA=f"{path} of {', '.join(cpu.paths())}",
    )
    _print(**{"with": f"{version}, torch {torch.__version__}"})


def _build_cuda(archs: Sequence[str]) -> None:
    library = build_cuda.build(archs)
    _print(
        compiled=" ".join(file.name for file in build_cuda.sources() if file.suffix in (".cpp", ".cu")),
        library=str(library),
        archs=" ".join(build_cuda.archs_of(library)),
    )
    _print(**{"with": f"{(library.parent / 'done').read_text()}, torch {torch.__version__}"})


def _check_cuda(archs: Sequence[str]) -> None:
    """Compile, link and load for the archs; print each kernel's resources; exit 1 on what should not be."""
    if build_cuda.compiler() is None:
        print("qat: nvcc is not found, so the CUDA kernels are not checked here (put nvcc on PATH, or set CUDA_HOME)")
        return
    library = build_cuda.load(archs)
    log = (library.parent / "build.log").read_text()
    print(resources.HEADER)
    for kernel in resources.kernels(log):
        print(kernel.line())
    found = resources.complaints(log) + _check_code(library)
    if found:
        raise SystemExit("\n".join(["qat: the CUDA kernels compile, but:", *found]))
    print(f"no spill, no warning; {library.name} links and loads, built by {(library.parent / 'done').read_text()}")


def _check_code(library: Path) -> list[str]:
    """Print what the main loops execute; what is beyond the gates, in words."""
    functions = sass.functions(library)
    if functions is None:
        print("machine code is not checked: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
        return []
    print(f"{'arch':8}{'bytes':>8}{'loop':>7}{'products':>10}{'each':>7}{'write':>7}  kernel")
    for one in functions:
        if one.main_loop is not None:
            loop = one.main_loop
            write = len(one.write_loop.instructions) if one.write_loop else ""
            print(f"{one.arch:8}{one.size:8}{len(loop.instructions):7}{loop.products:10}{loop.each:7.1f}{write:>7}  {one.name}")
    return gates.complaints(functions)


def _build_sanitized() -> None:
    print(" ".join(f"{key}={value}" for key, value in build_cpu.build_sanitized().items()))


def main() -> None:
    """Build the kernels ahead of their first use."""
    parser = argparse.ArgumentParser(prog="python -m qat.ops.build", description=main.__doc__)
    parser.add_argument(
        "--cuda-arch", nargs="+", metavar="ARCH", help="the CUDA kernels alone, for GPUs such as 80 90a, or native"
    )
    parser.add_argument(
        "--check", action="store_true", help="print the CUDA kernels' resources, and fail on a spill or a warning"
    )
    parser.add_argument(
        "--sanitize", action="store_true", help="build with AddressSanitizer and UBSan (used where QAT_SANITIZE=1)"
    )
    arguments = parser.parse_args()
    archs = arguments.cuda_arch
    if arguments.sanitize:
        parts = [_build_sanitized]
    elif arguments.check:
        parts = [lambda: _check_cuda(archs or build_cuda.ARCHS)]
    elif archs:
        parts = [lambda: _build_cuda(build_cuda.needed_archs() if archs == ["native"] else archs)]
    else:
        parts = [_build_cpu]
        if torch.version.cuda and build_cuda.compiler() is None:
            print("qat: torch has CUDA but nvcc is not found, so GPUs run the reference (put nvcc on PATH, or set CUDA_HOME)")
        elif torch.version.cuda:
            parts.append(lambda: _build_cuda(build_cuda.needed_archs()))
    failed = [error for error in map(_attempt, parts) if error]
    if failed:
        raise SystemExit("\n".join(f"qat: no compiled kernels: {error}" for error in failed))


def _attempt(part: Callable[[], None]) -> BuildError | None:
    """One part's failure does not keep the others from being built."""
    try:
        part()
    except BuildError as error:
        return error
    return None


if __name__ == "__main__":
    main()
