"""What a classifier reached at each stage of a run: accuracy, or F1, on one set of examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from qat.reporting.staged import Staged


@dataclass(frozen=True)
class Scores(Staged):
    """A mapping from the stages of a run to their values, shares within 0 to 1."""

    text: str = ""
    """The examples' name."""
    examples: int = 0
    """Those that are measured."""
    majority: float = 0.0
    """The share of the commonest label, which a model reaches that learned nothing."""
    measure: str = "accuracy"
    """`accuracy` or `f1` (the mean of the labels' own)."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """Stage -> value."""
    gap_title: ClassVar[str] = "points to\nfull precision"

    @property
    def title(self) -> str:
        """The examples and how many, the head of a column."""
        return f"{self.text}, {self.measure}\n{self.examples:,} examples"

    @property
    def words(self) -> str:
        """What is measured, for people."""
        return f"accuracy and F1; the commonest label alone has {self.majority:.1%}"

    def shown(self, value: float) -> str:
        """A value, for people: in percent."""
        return f"{100 * value:.2f}"

    def gap(self, value: float) -> str:
        """To full precision as it was trained, in points, for people; empty where there is nothing to compare with."""
        full = self.get("control", self.get("full_precision"))
        return "" if full is None or value == full else f"{100 * (value - full):+.2f}"

    def lines(self) -> list[str]:
        """How far below full precision."""
        found = self.recovered()
        if not found:
            return []
        points = found["points_below_full_precision"]
        share = f"{found['recovered_share']:.1%} of the accuracy lost by conversion; " if "recovered_share" in found else ""
        where = f"{abs(points):.2f} points {'below' if points >= 0 else 'above'} full precision"
        return [f"recovered  {share}{where} on {self.text}"]

    def key(self, name: str) -> str:
        """Of further examples, or a further measure of the run's own, in result.json."""
        return name if self.measure == "f1" else f"accuracy_{name}"

    def name(self, key: str) -> str:
        """The inverse of `key`."""
        return key if self.measure == "f1" else key.removeprefix("accuracy_")

    def recovered(self) -> dict[str, float]:
        """How much of the accuracy lost by conversion the training recovered, and the points that are left to full precision."""
        full = self.get("control", self.get("full_precision"))
        if full is None or not {"converted", "trained"} <= self.keys():
            return {}
        points = {"points_below_full_precision": 100 * (full - self["trained"])}
        lost = full - self["converted"]
        return {"recovered_share": (self["trained"] - self["converted"]) / lost, **points} if lost > 0 else points
