"""Which label has which number: the model's own, where its head was trained for some, else those of the training examples."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qat.data.labelled.reading import Example

MOST = 10_000
"""Labels; more are texts or numbers that were taken for labels."""
_UNNAMED = re.compile(r"LABEL_\d+")
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Labels:
    """`names[i]` is the label of number i."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], source: str) -> Labels:
        """The labels of training examples: whole numbers by value, words by alphabet.

        Raises:
            ValueError: fewer than two, or too many to be labels.
        """
        found = set(example.label for example in examples)
        if len(found) < 2:
            raise ValueError(f"data: every example of {source} has the label {examples[0].label!r}; there must be at least two")
        if len(found) > MOST or (len(found) == len(examples) > 2):
            raise ValueError(
                f"data: {source} has {len(found):,} labels in {len(examples):,} examples; is data.label_field the label's column?"
            )
        numbers = all(_NUMBER.fullmatch(one) for one in found)
        return cls(tuple(sorted(found, key=lambda one: (int(one), one) if numbers else one)))  # type: ignore[arg-type,return-value]

    @classmethod
    def in_order(cls, known: tuple[str, ...], examples: Sequence[Example], source: str) -> Labels:
        """The labels of a model's trained head; where it only numbers them (LABEL_0, ...), those of the examples in their order.

        Raises:
            ValueError: the head numbers another count of labels than the examples have.
        """
        if not all(_UNNAMED.fullmatch(name) for name in known):
            return cls(known)
        found = cls.of(examples, source)
        if len(found) != len(known):
            raise ValueError(f"data: {source} has {len(found)} labels, but the model's trained head has {len(known)}")
        return found

    def __len__(self) -> int:
        return len(self.names)

    def number(self, example: Example) -> int:
        """The label's number.

        Raises:
            ValueError: the label is none of these.
        """
        try:
            return self.names.index(example.label)
        except ValueError:
            known = ", ".join(map(repr, self.names[:10])) + (", ..." if len(self) > 10 else "")
            raise ValueError(f"{example.where}: the label {example.label!r} is none of those that are learned: {known}") from None

    def counts(self, numbers: Iterable[int]) -> list[int]:
        """How many of each there are."""
        found = Counter(numbers)
        return [found[i] for i in range(len(self))]

    def words(self, numbers: Iterable[int]) -> str:
        """The counts, for people."""
        return ", ".join(f"{name} {count:,}" for name, count in zip(self.names, self.counts(numbers), strict=True))
