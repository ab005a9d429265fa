"""What a monitor remembers of codes from look to look: those of the start and of the last look, and what changed lately.

Eight bits a code, where optimizer and weight have 96. What changed is a code: of a weight that is a sum of planes each plane's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.monitor.bits import counts, packed, words

LOOKS = 4
OFTEN = 2
"""A code that changed at so many of the last LOOKS oscillates."""


@dataclass(frozen=True)
class Trace:
    """Bits of all layers' codes, int64 [W] each: not 0, and above 0."""

    start: tuple[Tensor, Tensor]
    last: tuple[Tensor, Tensor]
    changes: tuple[Tensor, ...] = ()
    """Those of the last looks, the newest first."""

    @classmethod
    def begun(cls, codes: Sequence[Tensor]) -> Trace:
        """That of codes int8 which have not changed yet."""
        found = packed(codes)
        return cls(found, found)

    def looked(self, codes: Sequence[Tensor]) -> tuple[Trace, dict[str, Tensor]]:
        """The trace after another look, and of each layer how many codes, int64 [L]: changed since the last look, changed
        their sign or their being 0 from the start, and oscillate."""
        now, lengths = packed(codes), [words(one.numel()) for one in codes]
        changed = (now[0] ^ self.last[0]) | (now[1] ^ self.last[1])
        after = replace(self, last=now, changes=(changed, *self.changes)[:LOOKS])
        found = {
            "flip_rate": changed,
            "sign_flips": now[0] & self.start[0] & (now[1] ^ self.start[1]),
            "mask_changes": now[0] ^ self.start[0],
            "oscillating": _twice(after.changes),
        }
        return after, {name: counts(bits, lengths) for name, bits in found.items()}

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
