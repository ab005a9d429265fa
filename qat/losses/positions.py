"""Which positions of a batch are compared, as an index: a boolean mask is counted anew at every use, and a GPU waited for."""

from __future__ import annotations

from torch import Tensor


def positions(mask: Tensor) -> Tensor | None:
    """Where a bool mask is true, int64 [P] in its flat order; None: everywhere. On a GPU that waits for it."""
    flat = mask.reshape(-1)
    return None if bool(flat.all()) else flat.nonzero()[:, 0]
