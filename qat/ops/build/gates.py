"""What the CUDA kernels' machine code may be: `python -m qat.ops.build --check` fails beyond these limits.

A limit is what was reached, with a little room for another compiler, and below what the kernels of before had: decode executed
264 to 430 instructions for 8 products, with integer divisions in its loop. The counts, and how to get them, are in
docs/internals/kernels.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qat.ops.build.sass import Function

_SLOW = ("I2F", "F2I", "MUFU", "LDL", "STL")
"""Integer divisions (by way of I2F and MUFU), and registers kept in memory. On sm_80 a __syncwarp is a CALL."""


_SUMS = ("F2I", "MUFU", "LDL", "STL")
"""The same where integer sums of a group become floats, which is an I2F on sm_80."""
_LARGE = 64 << 10
"""Bytes of code, more than half of which is for divisors of extreme exponents and other dtypes."""
_WRITE = 150


@dataclass(frozen=True)
class Gate:
    """For kernels whose name the pattern fits: most executed instructions of the main loop for one product; bytes of code; and,
    if not None, most of the loop that writes 8 outputs a thread."""

    kernel: str
    each: float | None  # None: a kernel without products
    size: int = 1 << 20
    forbidden: tuple[str, ...] = _SLOW
    wide_copies: bool = True  # every copy to shared memory is 16 bytes
    write: int | None = None
    read: float | None = None  # most instructions for a load of 16 bytes, where a loop only reads
    arch: str = ""  # of one alone

    def complaints(self, function: Function) -> list[str]:
        """What is beyond the limits, in words."""
        who = f"{function.name} for {function.arch}"
        said = self._reading(function, who) if self.each is None else self._multiplying(function, who)
        if self.write is not None:
            said += self._writing(function, who)
        if function.size > self.size:
            said.append(f"{who} is {function.size} bytes, more than {self.size}")
        return said

    def _multiplying(self, function: Function, who: str) -> list[str]:
        loop, said = function.main_loop, []
        if loop is None:
            return [f"{who} has no loop with products of the tensor cores"]
        if self.each is not None and loop.each > self.each:
            said.append(f"{who} executes {loop.each:.1f} instructions a product in its main loop, more than {self.each}")
        for name in self.forbidden:
            if loop.opcodes[name]:
                said.append(f"{who} has {loop.opcodes[name]} {name} in its main loop")
        narrow = [text for text in loop.instructions if "LDGSTS" in text and ".128" not in text]
        if self.wide_copies and narrow:
            said.append(f"{who} has {len(narrow)} copies of less than 16 bytes in its main loop")
        return said

    def _reading(self, function: Function, who: str) -> list[str]:
        loop = function.read_loop
        if loop is None:
            return [f"{who} has no loop that reads"]
        loads = [text for text in loop.instructions if "LDG" in text]
        each, narrow = len(loop.instructions) / len(loads), [text for text in loads if ".128" not in text]
        said = [f"{who} executes {each:.1f} instructions a load, more than {self.read}"] * (each > (self.read or 0))
        said += [f"{who} has {len(narrow)} loads of less than 16 bytes in the loop that reads"] * bool(narrow)
        return said + [f"{who} has {loop.opcodes[name]} {name} where it reads" for name in self.forbidden if loop.opcodes[name]]

    def _writing(self, function: Function, who: str) -> list[str]:
        loop = function.write_loop
        if loop is None:
            return [f"{who} has no loop that writes its outputs"]
        count = len(loop.instructions)
        return [f"{who} executes {count} instructions to write 8 outputs, more than {self.write}"] * (count > (self.write or 0))


GATES = [
    Gate(r"^decode_kernel<1, true, .*0>", each=16.0, size=96 << 10),
    Gate(r"^decode_kernel<1, false, .*0>", each=17.0, size=64 << 10),
    Gate(r"^decode_kernel<2, false, .*0>", each=11.0, size=64 << 10),
    Gate(r"^decode_kernel<1, true, .*1>", each=34.0, size=96 << 10),
    Gate(r"^decode_kernel<1, false, .*1>", each=40.0, size=64 << 10),
    Gate(r"^decode_kernel<2, false, .*1>", each=30.0, size=64 << 10),
    Gate(r"^decode_kernel<., \w+, .*2>", each=28.0, size=96 << 10),
    Gate(r"^gemm_kernel<Shape<128, 256, 64, 64, false, false, true>", each=2.4, size=_LARGE, write=_WRITE),
    Gate(r"^gemm_kernel<Shape<128, 256, 64, 64, true, false, true>", each=4.0, size=_LARGE, write=_WRITE),
    Gate(r"^gemm_kernel<Shape<128, 128, 64, 32, false, false, true>", each=3.3, size=_LARGE, write=_WRITE),
    Gate(r"^gemm_kernel<Shape<128, 128, 64, 32, true, false, true>", each=5.0, size=_LARGE, write=_WRITE),
    Gate(r"^gemm_kernel<Shape<64, 64, 32, 32, false, false, true>", each=5.2, size=_LARGE, write=_WRITE),
    Gate(r"^gemm_kernel<Shape<64, 64, 32, 32, true, false, true>", each=8.6, size=_LARGE, write=_WRITE),
    Gate(r"^gemm_kernel<Shape<128, 128, 64, 32, \w+, true, true>", each=18.0, size=72 << 10, forbidden=_SUMS),
    Gate(r"^gemm_kernel<Shape<64, 64, 32, 32, \w+, true, true>", each=27.0, size=_LARGE, forbidden=_SUMS),
    Gate(r"^add_kernel<", each=None, read=10.0, size=24 << 10),
    Gate(r"^hopper_kernel<false>", each=14.5, size=_LARGE, write=_WRITE, arch="sm_90a"),
    Gate(r"^hopper_kernel<true>", each=19.0, size=_LARGE, write=_WRITE, arch="sm_90a"),
]
"""The first that fits a kernel's name counts. None is for operands that are copied by elements, whose names end in false."""


def complaints(functions: Sequence[Function], gates: Sequence[Gate] = GATES) -> list[str]:
    """What the functions' machine code has that it should not; a gate that no kernel fits is one, too."""
    said, fitted = [], set()
    for function in functions:
        gate = next((one for one in gates if re.search(one.kernel, function.name) and one.arch in ("", function.arch)), None)
        if gate is not None:
            fitted.add(gate)
            said += gate.complaints(function)
    archs = {"", *(function.arch for function in functions)}
    return said + [f"no kernel fits the gate {one.kernel}" for one in gates if one not in fitted and one.arch in archs]
