"""What ptxas -v says about each kernel: registers, shared memory, stack and spills, and every warning beside it.

A spill is a register kept in memory: it makes a kernel slow without a word. `python -m qat.ops.build --check` refuses it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """One kernel for one arch; `stack` and `spills` are bytes a thread, `shared` is the static part in bytes a block."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int

    def line(self) -> str:
        """Its row of the table."""
        return f"{self.arch:8}{self.registers:6}{self.shared:9}{self.stack:8}{self.spills:8}  {self.name}"


HEADER = f"{'arch':8}{'regs':>6}{'shared':>9}{'stack':>8}{'spills':>8}  kernel"
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def demangled(names: list[str]) -> list[str]:
    """Names as the source has them, without parameters, where binutils is there."""
    if not names or not (tool := shutil.which("c++filt")):
        return names
    done = subprocess.run([tool, "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [name.replace("(anonymous namespace)::", "") for name in done.stdout.splitlines()]


def kernels(log: str) -> list[Kernel]:
    """Every kernel that the log of a compilation with -Xptxas=-v reports."""
    found = list(_ENTRY.finditer(log))
    names = demangled([entry["name"] for entry in found])
    rows = []
    for entry, name in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        spills = int(entry["stores"]) + int(entry["loads"])
        rows.append(
            Kernel(name, entry["arch"], int(entry["registers"]), int(entry["stack"]), spills, int(shared[1]) if shared else 0)
        )
    return sorted(rows, key=lambda kernel: (kernel.arch, kernel.name))


def complaints(log: str) -> list[str]:
    """What a check refuses: kernels that spill, and warnings of any compiler; and a log without a kernel."""
    rows = kernels(log)
    spilling = [f"{row.name} for {row.arch} spills {row.spills} bytes" for row in rows if row.spills]
    warnings = [line.strip() for line in log.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE)]
    return ([] if rows else ["no kernel was compiled"]) + spilling + warnings
