"""What a monitor remembers of codes from look to look: those of the start and of the last look, and what changed lately.

Eight bits a code, where optimizer and weight have 96. What changed is a code: of a weight that is a sum of planes each plane's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.monitor.bits import Bits, joined, ones, spans, totals

LOOKS = 4
OFTEN = 2
"""A code that changed at so many of the last LOOKS oscillates."""


@dataclass(frozen=True)
class Trace:
    """Bits of all layers' codes, int64 [W] each: not 0, and above 0."""

    start: Bits
    last: Bits
    changes: tuple[Tensor, ...] = ()
    """Those of the last looks, the newest first."""

    @classmethod
    def begun(cls, codes: Sequence[Bits]) -> Trace:
        """That of layers' codes which have not changed yet."""
        found = joined(codes)
        return cls(found, found)

    def looked(self, codes: Sequence[Bits]) -> tuple[Trace, dict[str, Tensor]]:
        """The trace after another look at layers' codes, and of each layer how many, int64 [L]: changed since the last look,
        changed their sign or their being 0 from the start, and oscillate."""
        now, lengths = joined(codes), [len(kept) for kept, _ in codes]
        changed, counted = zip(*(self._compared(now, at) for at in spans(now[0])), strict=True)
        after = replace(self, last=now, changes=(torch.cat(changed), *self.changes)[:LOOKS])
        return after, {name: totals(torch.cat([one[name] for one in counted]), lengths) for name in counted[0]}

    def _compared(self, now: Bits, at: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """Of some words: the bits that changed since the last look, and how many of each word's codes did what."""
        (kept, above), (last_kept, last_above), (start_kept, start_above) = (
            (one[0][at], one[1][at]) for one in (now, self.last, self.start)
        )
        changed = (kept ^ last_kept) | (above ^ last_above)
        found = {
            "flip_rate": changed,
            "sign_flips": kept & start_kept & (above ^ start_above),
            "mask_changes": kept ^ start_kept,
            "oscillating": _twice([changed, *(one[at] for one in self.changes[: LOOKS - 1])]),
        }
        return changed, {name: ones(bits) for name, bits in found.items()}

    def state(self) -> dict[str, list[Tensor]]:
        """For a checkpoint."""
        return {"start": [*self.start], "last": [*self.last], "changes": [*self.changes]}

    @classmethod
    def of(cls, state: dict[str, list[Tensor]], device: torch.device) -> Trace:
        """The inverse of `state`, there."""
        start, last, changes = (tuple(one.to(device) for one in state[key]) for key in ("start", "last", "changes"))
        return cls(start, last, changes)  # type: ignore[arg-type]


def _twice(changes: Sequence[Tensor]) -> Tensor:
    """The bits that are set in OFTEN or more."""
    once = twice = torch.zeros_like(changes[0])
    for one in changes:
        twice = twice | (once & one)
        once = once | one
    return twice
