"""Sequences of like length side by side, in an order that is a function of (seed, position) as every other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from qat.data.order import generator


class Buckets:
    """Position of the stream -> index: cuts `order` into pools of about `bucket` positions, sorts each by `size`, and shuffles
    its blocks of `block` positions, which are the batches of all devices.

    A pool is a whole number of blocks. After a resume with another batch size the rest of a pool is cut anew.
    """

    def __init__(self, order: Callable[[int], int], size: Callable[[int], int], *, block: int, bucket: int, seed: int) -> None:
        self.order, self.size, self.block, self.seed = order, size, block, seed
        self.pool = max(bucket // block, 1) * block
        self._number, self._pool = -1, np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> int:
        number, within = divmod(position, self.pool)
        if number != self._number:
            self._number, self._pool = number, self._sorted(number)
        return int(self._pool[within])

    def _sorted(self, number: int) -> np.ndarray:
        found = np.array([self.order(position) for position in range(number * self.pool, (number + 1) * self.pool)])
        by_size = found[np.argsort([self.size(int(one)) for one in found], kind="stable")]
        blocks = torch.randperm(self.pool // self.block, generator=generator(self.seed, number, 1)).numpy()
        return by_size.reshape(-1, self.block)[blocks].reshape(-1)
