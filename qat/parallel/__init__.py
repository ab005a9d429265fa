"""Several processes that do one work: which one this is, what they tell each other, and how they fail together."""

from qat.parallel.ranks import (
    as_one,
    before_others,
    failed,
    first,
    first_here,
    gathered,
    in_turn,
    most,
    rank,
    same,
    shared,
    size,
    sums,
    together,
)

__all__ = [
    "as_one",
    "before_others",
    "failed",
    "first",
    "first_here",
    "gathered",
    "in_turn",
    "most",
    "rank",
    "same",
    "shared",
    "size",
    "sums",
    "together",
]
