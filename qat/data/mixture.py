"""Two texts read in one stream, with a share of the sequences from each whatever their sizes: real text and the teacher's own.

Position p of the stream belongs to the second text where floor((p + 1) share) > floor(p share), so every stretch of the stream
holds the share to within one sequence, and where a run stands follows from one number, as in `order`. Each text has epochs of
its own: a small one is repeated more often than a large one, and neither is cut. Rejected: drawing each sequence's text by
chance, whose share in a short run is a matter of luck.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch.utils.data import Dataset

from qat.data.order import Shuffled, Windows, predicted_tokens


class Mixture(Dataset):
    """Sequences of two texts, the second one's after the first one's; `order` says how they alternate."""

    collate = None  # torch's own: they have one length
    learned = staticmethod(predicted_tokens)

    def __init__(self, parts: tuple[Windows, Windows], share: float) -> None:
        self.parts, self.share, self.length = parts, Fraction(str(share)), parts[0].length

    def __len__(self) -> int:
        return len(self.parts[0]) + len(self.parts[1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """As `Windows`."""
        first, second = self.parts
        return first[index] if index < len(first) else second[index - len(first)]

    def counts(self, sequences: int) -> tuple[int, int]:
        """How many of the stream's first so many sequences are of each text."""
        second = sequences * self.share.numerator // self.share.denominator
        return sequences - second, second

    def order(self, seed: int) -> Alternating:
        """Which sequence stands at each position of the stream."""
        return Alternating(self, seed)


class Alternating:
    """Position of the stream -> index; the two texts' permutations are drawn from seeds of their own."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self.mixture, self.offset = mixture, len(mixture.parts[0])
        self.first, self.second = Shuffled(self.offset, seed), Shuffled(len(mixture.parts[1]), seed, 1)

    def __call__(self, position: int) -> int:
        first, second = self.mixture.counts(position)
        later = self.mixture.counts(position + 1)[1] > second
        return self.offset + self.second(second) if later else self.first(first)
