"""Which sequences make batch i: a pure function of (seed, i), so that a run resumes from one number.

Training reads an endless stream, epoch after epoch, each in its own permutation drawn from (seed, epoch). Batch i of W devices
with B sequences each is the stream's positions [i * B * W, (i + 1) * B * W), device r taking its r-th part. Nothing is dropped
between epochs: a batch may hold the end of one and the start of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from qat.losses.logits import IGNORE
from qat.parallel import sums

STEP_TOKENS = "step_tokens"
"""Key of a training batch: how many tokens, or labels, its whole optimizer step predicts on all ranks, an int."""


REPEATED = "repeated"
"""Key of a validation batch that is there only so that all ranks have as many; it counts nothing."""


def predicted_tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens a batch predicts: all but the first and the ignored ones."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def counted(
    batches: Iterable[dict[str, Any]], accumulate: int, learned: Callable[[Mapping[str, Any]], int] = predicted_tokens
) -> Iterator[dict[str, Any]]:
    """Each batch with STEP_TOKENS: `accumulate` of them, one optimizer step, are read ahead to count it, on all ranks."""
    iterator = iter(batches)
    while step := list(islice(iterator, accumulate)):
        total = int(sums([torch.tensor(sum(map(learned, step)))])[0])
        yield from ({**batch, STEP_TOKENS: total} for batch in step)


class Windows(Dataset):
    """Consecutive, non-overlapping windows of a token array [T]; the last T % length tokens are left out."""

    collate = None  # torch's own: they have one length
    learned = staticmethod(predicted_tokens)

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels`, int64 [length]; they are equal, since transformers' models shift labels themselves."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = self.tokens[index * self.length : (index + 1) * self.length].astype(np.int64)
        ids = torch.from_numpy(window)
        return {"input_ids": ids, "labels": ids.clone()}


class Shuffled:
    """The sequence at a position of an endless stream, epoch after epoch, each in the order of (seeds, epoch)."""

    def __init__(self, count: int, *seeds: int) -> None:
        self.count, self.seeds = count, seeds
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> int:
        epoch, within = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.count, *self.seeds, epoch)
        return int(self._order[within])


class StreamBatches(Sampler):
    """Batches of `index(position)` from position `start` (in sequences of all devices) on: all but `done` of `total_batches`.

    `done` does not follow from `start`, as batches may have had another size before a resume; by default they had the same. The
    length is `total_batches` however far the run had come: lightning adds the batches that a resumed run has behind it to those
    it fetches, and compares the sum with the length.
    """

    def __init__(
        self, index: Callable[[int], int], batch_size: int, *, total_batches: int, start: int = 0,
        done: int | None = None, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.index, self.batch_size, self.total_batches = index, batch_size, total_batches
        self.start, self.rank, self.world = start, rank, world
        self.done = start // (batch_size * world) if done is None else done

    def __len__(self) -> int:
        return self.total_batches

    def __iter__(self) -> Iterator[list[int]]:
        step = self.batch_size * self.world
        for batch in range(self.total_batches - self.done):
            first = self.start + batch * step + self.rank * self.batch_size
            yield [self.index(position) for position in range(first, first + self.batch_size)]


class Held(Sampler):
    """Batches of held-out sequences in order, the first `most` of them shared out: rank r has r, r + W, r + 2 W, ...

    Ranks that are left without one repeat the last, as a model that is sharded computes on all of them or none; `own` says how
    many batches are no repetition.
    """

    def __init__(self, count: int, batch_size: int, *, most: int | None = None, rank: int = 0, world: int = 1) -> None:
        batches = -(-count // batch_size) if most is None else min(-(-count // batch_size), most)
        places = range(rank, batches, world)
        self.count, self.batch_size, self.own = count, batch_size, len(places)
        self.places = [*places, *[batches - 1] * (-(-batches // world) - len(places))]

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[list[int]]:
        for place in self.places:
            first = place * self.batch_size
            yield [*range(first, min(first + self.batch_size, self.count))]


def marked(batches: Iterable[dict[str, Any]], own: int) -> Iterator[dict[str, Any]]:
    """The batches, those after the first `own` with REPEATED."""
    yield from (batch if number < own else {**batch, REPEATED: True} for number, batch in enumerate(batches))


def permutation(count: int, *seeds: int) -> np.ndarray:
    """The order [count] of one epoch, int64, from the numbers (seed, epoch) alone."""
    return torch.randperm(count, generator=generator(*seeds)).numpy()


def generator(*seeds: int) -> torch.Generator:
    """torch's CPU generator seeded by several non-negative numbers, as independent of (1, 2) as of (2, 1)."""
    state = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state)
