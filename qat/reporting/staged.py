"""What a run measured at each of its stages: a mapping from the stages to their values, and its form in result.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Self


class Staged(Mapping[str, float]):
    """For dataclasses: `stages`, and beside it fields that say what is measured."""

    text: str
    stages: Mapping[str, float]

    def __getitem__(self, stage: str) -> float:
        return self.stages[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    @classmethod
    def _about(cls) -> list[str]:
        return [one.name for one in fields(cls) if one.name != "stages"]  # type: ignore[arg-type]  # the children are dataclasses

    def to_dict(self) -> dict[str, Any]:
        """As result.json has it: one level deep; {} where nothing was measured."""
        return {**{key: getattr(self, key) for key in self._about()}, **self.stages} if self.text else {}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        about = {key: values[key] for key in cls._about() if key in values}
        stages = {key: value for key, value in values.items() if key not in about}
        return cls(**about, stages=stages)  # type: ignore[call-arg]  # the children's fields
