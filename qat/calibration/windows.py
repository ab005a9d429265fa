"""Which tokens a model is calibrated on: windows from all over a text, as its beginning alone is about too little."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BATCH = 8


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the indices 0 .. count - 1, evenly spread; ValueError where there are not so many."""
    if not 1 <= wanted <= count:
        raise ValueError(f"{wanted} windows are wanted of {count}")
    return [i * count // wanted for i in range(wanted)]


def windows_of(tokens: Tensor, length: int, wanted: int) -> list[Tensor]:
    """`wanted` windows of a text int64 [T], spread over it, as batches int64 [B, length]."""
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    return list(whole[spread(len(whole), wanted)].split(BATCH))


def batched(rows: Sequence[Tensor]) -> list[Tensor]:
    """Sequences int64 [L], as batches [B, L] of those that follow one another and are equally long."""
    found: list[list[Tensor]] = []
    for row in rows:
        if found and len(found[-1]) < BATCH and len(found[-1][0]) == len(row):
            found[-1].append(row)
        else:
            found.append([row])
    return [torch.stack(batch) for batch in found]
