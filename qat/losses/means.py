"""Means that do not depend on batches, nor on who computed them: sums and counts are added, and divided once."""

from __future__ import annotations

from qat import parallel
from qat.losses.record import Pair


class Means:
    """Adds `Pair`s by name. Batches are kept apart, a few numbers each, so that several ranks' are added in one order."""

    def __init__(self) -> None:
        self.batches: list[dict[str, tuple[float, int]]] = []

    def add(self, pairs: dict[str, Pair]) -> None:
        """Add a batch; sums of batches are float64."""
        self.batches.append({name: (float(total.detach()), count) for name, (total, count) in pairs.items()})

    def over_ranks(self) -> Means:
        """Those of all ranks together, as if one process had seen the batches in turn; all of them call it."""
        found = Means()
        found.batches = parallel.in_turn(self.batches)
        return found

    def values(self) -> dict[str, float]:
        """The mean of each; 0 where nothing was counted."""
        sums, counts = dict[str, float](), dict[str, int]()
        for batch in self.batches:
            for name, (total, count) in batch.items():
                sums[name] = sums.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + count
        return {name: sums[name] / max(count, 1) for name, count in counts.items()}
