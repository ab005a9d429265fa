"""Machine code of the compiled CUDA kernels, read: what a main loop executes, how large a kernel is.

Without a GPU nothing says how fast a kernel is, but its loop can be counted: a warp issues at most one instruction a cycle, so
instructions for each product of the tensor cores bound what share of their rate is reached. `python -m qat.ops.build --check`
compares the counts with gates.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from qat.ops.build.ptxas import demangled

PRODUCTS = ("IMMA", "IGMMA")
"""Opcodes of the tensor cores' integer products."""
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_BYTES = 16  # of an instruction
_CHECKED = ("FCHK",)
"""Of a division that asks for extreme exponents."""


def opcode(text: str) -> str:
    """`@P0 LDG.E.128 R4, ...` -> `LDG.E.128`."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


@dataclass(frozen=True)
class Loop:
    """A loop's longest way through, inner loops taken once."""

    instructions: tuple[str, ...]

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each is executed, without its modifiers."""
        return Counter(opcode(text).partition(".")[0] for text in self.instructions)

    @property
    def products(self) -> int:
        """Tensor core instructions."""
        return sum(self.opcodes[name] for name in PRODUCTS)

    @property
    def each(self) -> float:
        """Executed instructions for one product, itself among them."""
        return len(self.instructions) / self.products


@dataclass
class Function:
    """One kernel's machine code for one arch."""

    name: str
    arch: str
    code: list[tuple[int, str]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.code) * _BYTES

    @cached_property
    def _blocks(self) -> dict[int, list[tuple[int, str]]]:
        starts = {self.code[0][0]}
        for at, text in self.code:
            if target := _TARGET.search(text):
                starts.add(int(target[1], 16))
            if re.search(r"\b(BRA|EXIT|RET|BRX)\b", text):
                starts.add(at + _BYTES)
        blocks: dict[int, list[tuple[int, str]]] = {}
        current: list[tuple[int, str]] = []
        for at, text in self.code:
            if at in starts:
                current = blocks.setdefault(at, [])
            current.append((at, text))
        return blocks

    def _next(self, block: int) -> list[int]:
        at, text = self._blocks[block][-1]
        target, after = _TARGET.search(text), at + _BYTES
        conditional = text.startswith("@") or bool(re.search(r"BRA(\.\w+)* !?U?P\d", text))
        found = [int(target[1], 16)] if target else []
        if (conditional or not re.search(r"\b(BRA|EXIT|RET|BRX)\b", text)) and after in self._blocks:
            found.append(after)
        return found

    def _inside(self, head: int, end: int) -> set[int]:
        """The blocks of the loop whose last block is `end`: those that reach it without passing its head."""
        before: dict[int, list[int]] = {}
        for block in self._blocks:
            for after in self._next(block):
                before.setdefault(after, []).append(block)
        found, todo = {head}, [end]
        while todo:
            block = todo.pop()
            if block not in found:
                found.add(block)
                todo += before.get(block, [])
        return found

    def _longest(self, head: int, end: int, avoid: Collection[str] = ()) -> list[str]:
        """The longest way through a loop that meets none of these opcodes, ways back left out; empty where there is none."""
        inside, best, on_the_way = self._inside(head, end), dict[int, tuple[int, int | None]](), set[int]()
        inside -= {block for block in inside if any(opcode(text).partition(".")[0] in avoid for _, text in self._blocks[block])}
        if not {head, end} <= inside:
            return []

        def visit(block: int) -> None:
            on_the_way.add(block)
            later: list[tuple[int, int | None]] = [(0, None)] if block == end else []
            for after in self._next(block) if block != end else []:
                if after in inside and after != head and after not in on_the_way:
                    if after not in best:
                        visit(after)
                    if best[after][0] > 0:
                        later.append((best[after][0], after))
            on_the_way.discard(block)
            count, chosen = max(later, key=lambda one: one[0], default=(-(10**9), None))
            best[block] = count + len(self._blocks[block]), chosen

        visit(head)
        if best[head][0] <= 0:
            return []
        way: list[str] = []
        block: int | None = head
        while block is not None:
            way += [text for _, text in self._blocks[block]]
            block = best[block][1]
        return way

    @cached_property
    def _ends(self) -> list[tuple[int, int]]:
        """Head and last block of each loop."""
        return [(head, block) for block in self._blocks for head in self._next(block) if head <= block]

    @cached_property
    def main_loop(self) -> Loop | None:
        """The loop with the most products on its longest way; None where there is none."""
        loops = [Loop(tuple(self._longest(head, end))) for head, end in self._ends]
        return max((loop for loop in loops if loop.products), key=lambda loop: loop.products, default=None)

    @cached_property
    def _innermost(self) -> list[Loop]:
        """Loops without products that hold no other, on a way without checks of exponents."""
        inner = [one for one in self._ends if not any(other[0] in self._inside(*one) - {one[0]} for other in self._ends)]
        loops = [Loop(tuple(self._longest(head, end, _CHECKED))) for head, end in inner]
        return [loop for loop in loops if not loop.products]

    @cached_property
    def write_loop(self) -> Loop | None:
        """The longest of those that divides and writes; None where there is none."""
        found = [loop for loop in self._innermost if loop.opcodes["STG"] and loop.opcodes["MUFU"]]
        return max(found, key=lambda loop: len(loop.instructions), default=None)

    @cached_property
    def read_loop(self) -> Loop | None:
        """The one that reads most of global memory and writes nothing; None where there is none."""
        found = [loop for loop in self._innermost if loop.opcodes["LDG"] and not loop.opcodes["STG"]]
        return max(found, key=lambda loop: loop.opcodes["LDG"], default=None)


def parse(lines: Iterable[str]) -> list[Function]:
    """The functions of what `cuobjdump -sass` prints."""
    found: list[Function] = []
    arch = ""
    for line in lines:
        if line.startswith("\t\tFunction : "):
            found.append(Function(line.partition(" : ")[2].strip(), arch))
        elif named := re.match(r"\s*(?:arch =|code for) (sm_\w+)", line):
            arch = named[1]
        elif found and (instruction := _INSTRUCTION.match(line)):
            found[-1].code.append((int(instruction[1], 16), instruction[2]))
    for function, name in zip(found, demangled([one.name for one in found]), strict=True):
        function.name = name.replace("qat::cuda::", "")
    return [one for one in found if one.code]


def _folders() -> Iterator[Path]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    yield from ([Path(home) / "bin"] if home else [])
    yield Path("/usr/local/cuda/bin")
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or [] if package else []:
        yield from sorted(Path(folder).glob("cu*/bin"))


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on PATH, of $CUDA_HOME, or of the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    places = [None, *map(str, _folders())]
    return next((found for place in places if (found := shutil.which(name, path=place))), None)


def functions(binary: Path) -> list[Function] | None:
    """Every kernel in a library, or None where no disassembler is found."""
    dump, disassembler = tool("cuobjdump"), tool("nvdisasm")
    if dump is None or disassembler is None:
        return None
    path = os.pathsep.join([str(Path(disassembler).parent), os.environ.get("PATH", "")])
    command = [dump, "-sass", str(binary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": path}) as running:
        assert running.stdout is not None
        found = parse(running.stdout)
    return found
