"""Means that do not depend on batches: sums and counts are added, and divided once."""

from __future__ import annotations

from qat.losses.record import Pair


class Means:
    """Adds `Pair`s by name; several processes would add their sums and counts, and nothing else."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, pairs: dict[str, Pair]) -> None:
        """Add a batch; sums of batches are float64."""
        for name, (total, count) in pairs.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(total.detach())
            self.counts[name] = self.counts.get(name, 0) + count

    def values(self) -> dict[str, float]:
        """The mean of each; 0 where nothing was counted."""
        return {name: self.sums[name] / max(count, 1) for name, count in self.counts.items()}
