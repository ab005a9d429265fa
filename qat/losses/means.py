"""Means that do not depend on batches, nor on who computed them: sums and counts are added, and divided once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qat import parallel
from qat.losses.record import Pair


class Means:
    """Adds `Pair`s by name. Batches are kept apart, a few numbers each, so that several ranks' are added in one order."""

    def __init__(self, batches: list[dict[str, tuple[float, int]]] | None = None) -> None:
        self._batches = batches or []
        self._waiting: list[dict[str, Pair]] = []

    def add(self, pairs: dict[str, Pair]) -> None:
        """Add a batch. Its sums stay where they are, so that no GPU is waited for."""
        self._waiting.append({name: (total.detach(), count) for name, (total, count) in pairs.items()})

    @property
    def batches(self) -> list[dict[str, tuple[float, int]]]:
        """Name -> sum and count of each batch; all that wait are fetched at once."""
        waiting, self._waiting = self._waiting, []
        totals = [total.double() for one in waiting for total, _ in one.values()]
        fetched = iter(torch.stack(totals).tolist() if totals else [])
        self._batches += [{name: (next(fetched), count) for name, (_, count) in one.items()} for one in waiting]
        return self._batches

    def over_ranks(self) -> Means:
        """Those of all ranks together, as if one process had seen the batches in turn; all of them call it."""
        return Means(parallel.in_turn(self.batches))

    @classmethod
    def of_this_rank(cls, batches: Sequence[dict[str, tuple[float, int]]]) -> Means:
        """The share of this rank in what `over_ranks` put together, however many there were then."""
        return cls(list(batches[parallel.rank() :: parallel.size()]))

    def values(self) -> dict[str, float]:
        """The mean of each; 0 where nothing was counted."""
        sums, counts = dict[str, float](), dict[str, int]()
        for batch in self.batches:
            for name, (total, count) in batch.items():
                sums[name] = sums.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + count
        return {name: sums[name] / max(count, 1) for name, count in counts.items()}
