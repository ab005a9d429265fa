"""I2_S, the 2-bit type of bitnet.cpp (a fork of llama.cpp): codes t + 1 of a whole tensor, then its one float32 scale.

    x86   128 weights in 32 bytes; byte p holds weights p, 32 + p, 64 + p, 96 + p in bits 7:6, 5:4, 3:2, 1:0
    arm   64 weights in 16 bytes; byte p holds weights p, 16 + p, 32 + p, 48 + p likewise

N * K / 4 bytes of codes, 4 of scale, 28 of padding. The file depends on the machine that will run it, and nothing in it says
which, so the writer must be told; ours notes it under a key of our own. Number 36 was another type in older llama.cpp files;
mainline readers refuse it today.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMBER, FTYPE = 36, 40
ORDER_KEY = "qat.i2_s"
TRAILER = 32
STRIDES = {"x86": 32, "arm": 16}


def encode(t: NDArray[Any], scale: float, order: str) -> NDArray[np.uint8]:
    """Codes t [N, K] and the scale as uint8 [N * K / 4 + 32]; ValueError where a row does not fill whole blocks."""
    stride = _stride(order)
    check_width(t.shape[1], order)
    fields = (t + 1).astype(np.uint8).reshape(-1, 4, stride)
    packed = fields[:, 0] << 6 | fields[:, 1] << 4 | fields[:, 2] << 2 | fields[:, 3]
    trailer = np.zeros(TRAILER, np.uint8)
    trailer[:4] = np.array([scale], "<f4").view(np.uint8)
    return np.concatenate([packed.reshape(-1), trailer])


def decode(data: NDArray[np.uint8], shape: tuple[int, int], order: str) -> tuple[NDArray[np.int8], np.float32]:
    """Codes int8 [N, K] and the scale; ValueError for a wrong length, code 3 or a scale that is not finite."""
    stride, count = _stride(order), shape[0] * shape[1]
    check_width(shape[1], order)
    if data.shape != (count // 4 + TRAILER,):
        raise ValueError(f"is {list(data.shape)} bytes, but I2_S of {list(shape)} has {count // 4 + TRAILER}")
    packed = data[:-TRAILER].reshape(-1, 1, stride)
    q = packed >> np.array([6, 4, 2, 0], np.uint8)[:, None] & 3
    if (q == 3).any():
        raise ValueError("holds code 3, so it is not ternary")
    scale = np.ascontiguousarray(data[-TRAILER : 4 - TRAILER]).view("<f4")[0]
    if not np.isfinite(scale):
        raise ValueError("holds a scale that is not finite")
    return q.reshape(shape).astype(np.int8) - 1, scale


def check_width(k: int, order: str) -> None:
    """ValueError unless rows of K weights fill whole blocks."""
    if k % (4 * _stride(order)):
        raise ValueError(f"a row of {k} weights is no multiple of the {4 * _stride(order)} of an I2_S block ({order})")


def _stride(order: str) -> int:
    if order not in STRIDES:
        raise ValueError(f"I2_S order {order!r} is not known; choose one of {', '.join(STRIDES)}")
    return STRIDES[order]
