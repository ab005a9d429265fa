"""Byte layouts of ternary codes t in {-1, 0, 1}, as pure functions. Every row is packed on its own.

    2bit    four consecutive weights along K a byte, least significant bits first, code t + 1; rows padded with code 1
    base3   five consecutive weights a byte, sum of (t + 1) * 3^i; rows padded with digit 1; 243 of 256 bytes are valid

Padding is the zero weight, so a kernel may run over it. The width K is not in the bytes: whoever stores them keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How many weights share a byte, the number base of their codes, and which kind of `record.KINDS` they are."""

    per_byte: int
    base: int
    holds: str = "ternary"

    @property
    def limit(self) -> int:
        """Bytes from here on hold no valid codes (2bit is checked digit by digit instead)."""
        return self.base**self.per_byte

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of K weights."""
        return -(-k // self.per_byte)

    def powers(self, device: torch.device) -> Tensor:
        """base^i for i below per_byte, int32."""
        return torch.tensor([self.base**i for i in range(self.per_byte)], dtype=torch.int32, device=device)


_CODE_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
LAYOUTS = {"2bit": Layout(4, 4), "base3": Layout(5, 3)}


def get_layout(name: str) -> Layout:
    """The layout of that name, or ValueError naming the allowed ones."""
    if name not in LAYOUTS:
        raise ValueError(f"layout={name!r} is not known; choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def pack_ternary(t: Tensor, layout: str) -> Tensor:
    """Pack codes t [N, K], values in {-1, 0, 1} of a signed integer dtype or uint8, into uint8 [N, ceil(K / per_byte)].

    Raises:
        ValueError: unknown layout, not an integer matrix, or a value outside {-1, 0, 1} (its index is named).
    """
    form = get_layout(layout)
    if t.ndim != 2 or t.dtype not in _CODE_DTYPES:
        raise ValueError(f"t must be an integer matrix [N, K], not {t.dtype} {list(t.shape)}")
    t = t.to(torch.int16) if t.dtype == torch.uint8 else t
    bad = (t < -1) | (t > 1)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"t[{row}, {column}] = {t[row, column].item()} is not a ternary code; allowed are -1, 0, 1")
    n, k = t.shape
    codes = torch.ones(n, form.row_bytes(k) * form.per_byte, dtype=torch.int32, device=t.device)
    codes[:, :k] += t
    groups = codes.reshape(n, form.row_bytes(k), form.per_byte)
    return (groups * form.powers(t.device)).sum(-1).to(torch.uint8)


def encode(t: Tensor) -> Tensor:
    """`pack_ternary` in layout 2bit for a quantizer's codes int8: no look at the values, so no wait for a GPU."""
    digits = (torch.nn.functional.pad(t, (0, -t.shape[1] % 4)) + 1).view(torch.uint8).unflatten(1, (-1, 4))
    return digits[..., 0] | digits[..., 1] << 2 | digits[..., 2] << 4 | digits[..., 3] << 6


def check_packed(packed: Tensor, k: int, layout: str, name: str = "packed") -> None:
    """Raise ValueError unless `packed` is a valid uint8 [N, ceil(K / per_byte)] whose every byte decodes."""
    form = get_layout(layout)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != form.row_bytes(k):
        raise ValueError(
            f"{name} must be uint8 [N, {form.row_bytes(k)}] for in_features={k} in layout {layout},"
            f" not {packed.dtype} {list(packed.shape)}"
        )
    bad = packed >= form.limit if layout == "base3" else (packed & (packed >> 1) & 0x55) != 0
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}[{row}, {column}] = {packed[row, column].item()} holds no ternary codes in layout {layout}")


def decode(packed: Tensor, k: int, layout: str) -> Tensor:
    """`unpack_ternary` for bytes that were checked before: no look at the values, so no wait for a GPU."""
    form = get_layout(layout)
    digits = packed.to(torch.int32)[..., None] // form.powers(packed.device) % form.base
    return (digits - 1).to(torch.int8).flatten(1)[:, :k].contiguous()


def unpack_ternary(packed: Tensor, k: int, layout: str) -> Tensor:
    """Codes int8 [N, K] of packed uint8 [N, ceil(K / per_byte)]; inverse of `pack_ternary`.

    Raises:
        ValueError: unknown layout, wrong dtype or length, or a byte that holds no ternary codes.
    """
    check_packed(packed, k, layout)
    return decode(packed, k, layout)
