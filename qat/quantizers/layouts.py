"""The byte layouts of ternary codes, as records that say what they hold. Torch is not imported here: the configuration asks them.

A layout's `code` names an object with

    pack(codes int32 [N, K] of allowed values)  -> uint8 [N, row_bytes(K)]
    decode(packed uint8 [N, row_bytes(K)], K)   -> int8 [N, K]
    invalid(packed, K)                          -> bool, shaped like packed: bytes that `pack` never writes
    misfits(codes [N, K] in {-1, 0, 1})         -> bool [N, K]: codes that the layout has no place for
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qat.quantizers.record import resolve


@dataclass(frozen=True)
class Layout:
    """So many weights of a row in so many bytes; a row's last bytes are padded."""

    weights: int
    bytes: int
    code: str
    holds: str = "ternary"
    """Of `record.KINDS`."""

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of K weights."""
        return -(-k * self.bytes // self.weights)

    @property
    def bits(self) -> float:
        """Of a weight, padding left out."""
        return 8 * self.bytes / self.weights

    @property
    def coder(self) -> Any:
        """What `code` names."""
        return resolve(self.code)


_HERE = "qat.quantizers.packing"
LAYOUTS = {
    "2bit": Layout(4, 1, f"{_HERE}.digits:TWO_BIT"),
    "base3": Layout(5, 1, f"{_HERE}.digits:BASE3"),
    "sparse": Layout(32, 5, f"{_HERE}.sparse", holds="sparse"),
}


def get_layout(name: str) -> Layout:
    """The layout of that name, or ValueError naming the allowed ones."""
    if name not in LAYOUTS:
        raise ValueError(f"layout={name!r} is not known; choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
