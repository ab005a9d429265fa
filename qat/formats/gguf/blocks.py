"""Ternary and binary block types of GGUF, as pure functions on numpy arrays. Each row is cut into blocks along K.

    type    weights  bytes  bits/weight  layout (d is float16 and multiplies)
    TQ1_0   256      54     1.6875       48 + 4 bytes of base-3 digits, then d; see `_pack_tq1`
    TQ2_0   256      66     2.0625       64 bytes, then d; byte 32h + p: weights 128h + p + (0, 32, 64, 96), lowest bits first
    Q2_0    64       18     2.25         d, then 16 bytes: four consecutive weights a byte, lowest bits first
    Q1_0    128      18     1.125        d, then 16 bytes: eight consecutive weights a byte, lowest bit first; 1 is +d, 0 is -d

Ternary codes are stored as t + 1. The layouts are those of ggml-quants.c. Old files label blocks of 128 weights (34 bytes) as
Q2_0, too: same codec, other block, so a reader tells them by the size of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
_POWERS = np.array([81, 27, 9, 3, 1], dtype=np.uint16)  # the first digit is the most significant
_TQ1_RUNS = ((32, 5), (16, 5), (4, 4))  # (bytes, digits a byte) of the three parts of a block, in order


def _pack_tq1(t: Codes) -> Bytes:
    """[B, 256] -> [B, 52]. Weight n < 160 is digit n / 32 of byte n % 32, and so on in runs of 16 and 4 bytes.

    A byte is ceil(q * 256 / 243) for the digits' value q, so that digit k is ((byte * 3^k mod 256) * 3) >> 8.
    """
    digits, parts, start = (t + 1).astype(np.uint16), [], 0
    for width, count in _TQ1_RUNS:
        run = digits[:, start : start + width * count].reshape(-1, count, width)
        q = (run * _POWERS[:count, None]).sum(1, dtype=np.uint16)
        parts.append((q * 256 + 242) // 243)
        start += width * count
    return np.concatenate(parts, 1).astype(np.uint8)


def _unpack_tq1(packed: Bytes) -> Codes:
    parts, start = [], 0
    for width, count in _TQ1_RUNS:
        shifted = packed[:, start : start + width].astype(np.uint16)[:, None] * _POWERS[::-1][:count, None] & 255
        parts.append((shifted * 3 >> 8).reshape(len(packed), -1))
        start += width
    return np.concatenate(parts, 1).astype(np.int8) - 1


def _pack_tq2(t: Codes) -> Bytes:
    quarters = (t + 1).astype(np.uint8).reshape(-1, 2, 4, 32)
    return _merge(quarters.swapaxes(1, 2).reshape(-1, 4, 64), 2)


def _unpack_tq2(packed: Bytes) -> Codes:
    quarters = _part(packed, 4, 2).reshape(-1, 4, 2, 32).swapaxes(1, 2)
    return _ternary(quarters.reshape(-1, 256))


def _pack_q2(t: Codes) -> Bytes:
    return _merge((t + 1).astype(np.uint8).reshape(len(t), -1, 4).swapaxes(1, 2), 2)


def _unpack_q2(packed: Bytes) -> Codes:
    return _ternary(_part(packed, 4, 2).swapaxes(1, 2).reshape(len(packed), -1))


def _pack_q1(t: Codes) -> Bytes:
    return np.packbits(t > 0, axis=1, bitorder="little")


def _unpack_q1(packed: Bytes) -> Codes:
    return np.unpackbits(packed, axis=1, bitorder="little").astype(np.int8) * 2 - 1


def _merge(fields: Bytes, bits: int) -> Bytes:
    """[B, F, W] -> [B, W]: field f in the bits from bits * f on."""
    shifts = np.arange(fields.shape[1], dtype=np.uint8)[:, None] * bits
    return np.bitwise_or.reduce(fields << shifts, axis=1).astype(np.uint8)


def _part(packed: Bytes, count: int, bits: int) -> Bytes:
    """[B, W] -> [B, F, W], inverse of `_merge`."""
    shifts = np.arange(count, dtype=np.uint8)[:, None] * bits
    return (packed[:, None] >> shifts & ((1 << bits) - 1)).astype(np.uint8, copy=False)


def _ternary(q: Bytes) -> Codes:
    if (q == 3).any():
        raise ValueError("holds code 3 (weight +2 d), so it is not ternary")
    return q.astype(np.int8) - 1


@dataclass(frozen=True)
class BlockType:
    """One type: its number in the file, its llama.cpp file type, its size, and how codes become bytes."""

    number: int
    ftype: int
    weights: int
    bytes: int
    codes: tuple[int, ...]
    scale_first: bool
    pack: Callable[[Codes], Bytes]
    unpack: Callable[[Bytes], Codes]

    @property
    def bits(self) -> float:
        """Bits a weight, with the scale."""
        return 8 * self.bytes / self.weights


_TERNARY = (-1, 0, 1)
BLOCKS = {
    "tq1_0": BlockType(34, 36, 256, 54, _TERNARY, False, _pack_tq1, _unpack_tq1),
    "tq2_0": BlockType(35, 37, 256, 66, _TERNARY, False, _pack_tq2, _unpack_tq2),
    "q1_0": BlockType(41, 40, 128, 18, (-1, 1), True, _pack_q1, _unpack_q1),
    "q2_0": BlockType(42, 41, 64, 18, _TERNARY, True, _pack_q2, _unpack_q2),
}
NAMES = {kind.number: name for name, kind in BLOCKS.items()}
OLD_Q2_0 = (128, 34)


def encode(t: NDArray[Any], d: NDArray[Any], name: str) -> Bytes:
    """Codes t int8 [N, K] and scales d float16 [N, K / weights] as the rows' bytes, uint8 [N, K / weights * bytes].

    Raises:
        ValueError: the width is no multiple of the block, a code does not fit the type, or a scale is not finite.
    """
    kind = BLOCKS[name]
    n, k = t.shape
    if k % kind.weights:
        raise ValueError(f"a row of {k} weights is no multiple of the {kind.weights} of a {name} block")
    if d.dtype != np.float16 or d.shape != (n, k // kind.weights):
        raise ValueError(f"d must be float16 [{n}, {k // kind.weights}] for {name}, not {d.dtype} {list(d.shape)}")
    if not np.isin(t, kind.codes).all():
        raise ValueError(f"codes outside {kind.codes} do not fit {name}")
    if not np.isfinite(d).all():
        raise ValueError(f"a scale is not finite in float16 (for {name})")
    codes = kind.pack(np.ascontiguousarray(t, np.int8).reshape(-1, kind.weights))
    scale = np.ascontiguousarray(d, "<f2").reshape(-1, 1).view(np.uint8)
    return np.concatenate([scale, codes] if kind.scale_first else [codes, scale], 1).reshape(n, -1)


def decode(rows: Bytes, name: str) -> tuple[Codes, NDArray[np.float16]]:
    """Inverse of `encode`: codes int8 [N, K] and scales float16 [N, K / weights].

    Raises:
        ValueError: bytes that `encode` never writes: code 3, unused base-3 values, a scale that is not finite.
    """
    kind = BLOCKS[name]
    n = len(rows)
    blocks = np.ascontiguousarray(rows).reshape(-1, kind.bytes)
    cut = 2 if kind.scale_first else kind.bytes - 2
    scale, codes = (blocks[:, :cut], blocks[:, cut:]) if kind.scale_first else (blocks[:, cut:], blocks[:, :cut])
    d = np.ascontiguousarray(scale).view("<f2").astype(np.float16).reshape(n, -1)
    if not np.isfinite(d).all():
        raise ValueError("holds a scale that is not finite")
    t = kind.unpack(np.ascontiguousarray(codes))
    if name == "tq1_0" and not np.array_equal(kind.pack(t), codes):
        raise ValueError("holds bytes that stand for no five base-3 digits")
    return t.reshape(n, -1), d


def dequantize(t: Codes, d: NDArray[Any]) -> NDArray[np.float32]:
    """t [N, K] * d [N, G], float32, as every reader computes it."""
    n, k = t.shape
    scaled = t.reshape(n, d.shape[1], -1) * d.astype(np.float32)[..., None]
    return scaled.astype(np.float32, copy=False).reshape(n, k)
