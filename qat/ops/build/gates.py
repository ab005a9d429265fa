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


@dataclass(frozen=True)
class Gate:
    """For kernels whose name the pattern fits: most executed instructions of the main loop for one product; bytes of code."""

    kernel: str
    each: float
    size: int = 1 << 20
    forbidden: tuple[str, ...] = _SLOW
    wide_copies: bool = True  # every copy to shared memory is 16 bytes

    def complaints(self, function: Function) -> list[str]:
        """What is beyond the limits, in words."""
        loop, who = function.main_loop, f"{function.name} for {function.arch}"
        if loop is None:
            return [f"{who} has no loop with products of the tensor cores"]
        said = []
        if loop.each > self.each:
            said.append(f"{who} executes {loop.each:.1f} instructions a product in its main loop, more than {self.each}")
        for name in self.forbidden:
            if loop.opcodes[name]:
                said.append(f"{who} has {loop.opcodes[name]} {name} in its main loop")
        narrow = [text for text in loop.instructions if "LDGSTS" in text and ".128" not in text]
        if self.wide_copies and narrow:
            said.append(f"{who} has {len(narrow)} copies of less than 16 bytes in its main loop")
        if function.size > self.size:
            said.append(f"{who} is {function.size} bytes, more than {self.size}")
        return said


GATES = [
    Gate(r"^decode_kernel<1, true, .*0>", each=16.0, size=96 << 10),
    Gate(r"^decode_kernel<1, false, .*0>", each=17.0, size=64 << 10),
    Gate(r"^decode_kernel<2, false, .*0>", each=11.0, size=64 << 10),
    Gate(r"^decode_kernel<1, true, .*1>", each=34.0, size=96 << 10),
    Gate(r"^decode_kernel<1, false, .*1>", each=40.0, size=64 << 10),
    Gate(r"^decode_kernel<2, false, .*1>", each=30.0, size=64 << 10),
    Gate(r"^decode_kernel<., \w+, .*2>", each=28.0, size=96 << 10),
]
"""The first that fits a kernel's name counts; kernels that none fits have no gate yet."""


def complaints(functions: Sequence[Function], gates: Sequence[Gate] = GATES) -> list[str]:
    """What the functions' machine code has that it should not; a gate that no kernel fits is one, too."""
    said, fitted = [], set()
    for function in functions:
        gate = next((one for one in gates if re.search(one.kernel, function.name)), None)
        if gate is not None:
            fitted.add(gate)
            said += gate.complaints(function)
    return said + [f"no kernel fits the gate {one.kernel}" for one in gates if one not in fitted]
