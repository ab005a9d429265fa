"""Byte layouts of ternary codes t in {-1, 0, 1}, as pure functions. Every row is packed on its own.

    2bit    four consecutive weights along K a byte, least significant bits first, code t + 1; rows padded with code 1
    base3   five consecutive weights a byte, sum of (t + 1) * 3^i; rows padded with digit 1; 243 of 256 bytes are valid
    sparse  four consecutive weights, one of them zero, in 5 bits; see `sparse`

In the first two padding is the zero weight, so a kernel may run over it. The width K is not in the bytes: whoever stores them
keeps it. Kernels read 2bit and base3; of another layout they are given `two_bit`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.quantizers.layouts import get_layout

_CODE_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
KERNEL_LAYOUTS = ("2bit", "base3")


def pack_ternary(t: Tensor, layout: str) -> Tensor:
    """Pack codes t [N, K], values in {-1, 0, 1} of a signed integer dtype or uint8, into uint8 [N, row_bytes(K)].

    Raises:
        ValueError: unknown layout, not an integer matrix, a value outside {-1, 0, 1}, or codes that the layout has no place for
            (an index is named).
    """
    form = get_layout(layout)
    if t.ndim != 2 or t.dtype not in _CODE_DTYPES:
        raise ValueError(f"t must be an integer matrix [N, K], not {t.dtype} {list(t.shape)}")
    t = t.to(torch.int16) if t.dtype == torch.uint8 else t
    bad = (t < -1) | (t > 1)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"t[{row}, {column}] = {t[row, column].item()} is not a ternary code; allowed are -1, 0, 1")
    bad = form.coder.misfits(t)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"t[{row}, {column}:] does not fit layout {layout}, of one zero in each four codes")
    return form.coder.pack(t.to(torch.int32))


def encode(t: Tensor) -> Tensor:
    """`pack_ternary` in layout 2bit for a quantizer's codes int8: no look at the values, so no wait for a GPU."""
    digits = (torch.nn.functional.pad(t, (0, -t.shape[1] % 4)) + 1).view(torch.uint8).unflatten(1, (-1, 4))
    return digits[..., 0] | digits[..., 1] << 2 | digits[..., 2] << 4 | digits[..., 3] << 6


def two_bit(packed: Tensor, k: int, layout: str) -> Tensor:
    """Bytes of any layout in layout 2bit, those of 2bit as they are."""
    return packed if layout == "2bit" else encode(decode(packed, k, layout))


def check_packed(packed: Tensor, k: int, layout: str, name: str = "packed") -> None:
    """Raise ValueError unless `packed` is a valid uint8 [N, row_bytes(K)] whose every byte decodes."""
    form = get_layout(layout)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != form.row_bytes(k):
        raise ValueError(
            f"{name} must be uint8 [N, {form.row_bytes(k)}] for in_features={k} in layout {layout},"
            f" not {packed.dtype} {list(packed.shape)}"
        )
    bad = form.coder.invalid(packed, k)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}[{row}, {column}] = {packed[row, column].item()} holds no ternary codes in layout {layout}")


def for_kernels(packed: Tensor, k: int, layout: str) -> tuple[Tensor, str]:
    """Bytes that kernels read, and their layout. Raises ValueError as `check_packed` does."""
    check_packed(packed, k, layout)
    return (packed, layout) if layout in KERNEL_LAYOUTS else (two_bit(packed, k, layout), "2bit")


def decode(packed: Tensor, k: int, layout: str) -> Tensor:
    """`unpack_ternary` for bytes that were checked before: no look at the values, so no wait for a GPU."""
    return get_layout(layout).coder.decode(packed, k)


def unpack_ternary(packed: Tensor, k: int, layout: str) -> Tensor:
    """Codes int8 [N, K] of packed uint8 [N, row_bytes(K)]; inverse of `pack_ternary`.

    Raises:
        ValueError: unknown layout, wrong dtype or length, or a byte that holds no ternary codes.
    """
    check_packed(packed, k, layout)
    return decode(packed, k, layout)
