"""Bytes that one device sends in a step, by ring algorithms: a gather of S bytes has each of W devices send S (W - 1) / W.

Of a matrix that is divided by rows, each of W devices has ceil(N / W) of them, padded where there are fewer: that much travels.
"""

from __future__ import annotations

from collections.abc import Iterable

Shape = tuple[int, int]
"""Rows, and elements of a row."""


def rows(count: int, devices: int) -> int:
    """Rows of the fullest device."""
    return -(-count // devices)


def all_gather(shapes: Iterable[Shape], devices: int, bits: float) -> int:
    """Of matrices in parts, `bits` an element and whole bytes a row: each device passes on all parts but one."""
    return (devices - 1) * sum(rows(n, devices) * round(-(-k * bits // 8)) for n, k in shapes)


def reduce_scatter(shapes: Iterable[Shape], devices: int, bits: float = 32) -> int:
    """Of whole matrices that become parts: as much as gathering them."""
    return all_gather(shapes, devices, bits)


def all_reduce(size: int, devices: int) -> int:
    """Of a buffer of so many bytes, whole on each device before and after: a reduce-scatter and an all-gather."""
    return 2 * (devices - 1) * size // devices
