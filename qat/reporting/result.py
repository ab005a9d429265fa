"""What a run reports: RunResult, which is result.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qat.storage import parse_json, write_text


@dataclass(frozen=True)
class Perplexity(Mapping[str, float]):
    """The perplexities of one text, as a mapping from the stages of a run to their values."""

    text: str = ""
    """Its name."""
    tokens: int = 0
    """Those that are measured; of chats those that are scored."""
    context: int = 0
    """Tokens a window."""
    stride: int = 0
    """Tokens from one window to the next."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """Stage -> perplexity."""

    def __getitem__(self, stage: str) -> float:
        return self.stages[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    def to_dict(self) -> dict[str, Any]:
        """As result.json has it: one level deep; {} where no text was measured."""
        about = {"text": self.text, "tokens": self.tokens, "context": self.context, "stride": self.stride}
        return {**about, **self.stages} if self.text else {}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Perplexity:
        """The inverse of `to_dict`."""
        about = {key: values[key] for key in ("text", "tokens", "context", "stride") if key in values}
        return cls(**about, stages={key: value for key, value in values.items() if key not in about})


@dataclass(frozen=True)
class RunResult:
    """Everything a run measured. A key is absent for what was not run; nothing is null for what failed."""

    status: str = "running"
    recipe: str = ""
    folder: str = ""
    perplexity: Perplexity = field(default_factory=Perplexity)
    """On the recipe's evaluation text."""
    further: dict[str, Perplexity] = field(default_factory=dict)
    """Name -> the same for a further text; in JSON as `perplexity_<name>`."""
    conversion: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    """Of a start from calibrated codes: tokens, seconds, error."""
    export: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    control: dict[str, Any] = field(default_factory=dict)
    seconds_total: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    config_hash: str = ""
    signal: int | None = None
    """The signal that interrupted the run; not in JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; sections that were not run are left out."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("further", "signal")}
        plain["perplexity"] = self.perplexity.to_dict()
        kept = {key: value for key, value in plain.items() if value not in (None, {}, "")}
        further = {f"perplexity_{name}": value.to_dict() for name, value in self.further.items()}
        return {**kept, **further, **recovered(self.perplexity)}

    def to_json(self) -> str:
        """result.json."""
        return json.dumps(self.to_dict(), indent=2)

    def save(self, folder: Path) -> None:
        """Write result.json whole or not at all."""
        write_text(folder / "result.json", self.to_json() + "\n")


def read_result(folder: Path) -> RunResult | None:
    """The result.json of a run; None where there is none that can be read."""
    try:
        values = parse_json((folder / "result.json").read_text(encoding="utf-8"))
        names = {one.name for one in fields(RunResult)} - {"further", "signal", "perplexity"}
        texts = {key: Perplexity.from_dict(value) for key, value in values.items() if key.partition("_")[0] == "perplexity"}
        first = texts.pop("perplexity", Perplexity())
        further = {key.removeprefix("perplexity_"): value for key, value in texts.items()}
        known = {key: value for key, value in values.items() if key in names}
        return RunResult(perplexity=first, further=further, **known)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def recovered(perplexity: Mapping[str, float]) -> dict[str, float]:
    """How much of the log-perplexity lost by conversion the training recovered, and ln(trained / full precision)."""
    if not {"full_precision", "converted", "trained"} <= perplexity.keys():
        return {}
    full, converted, trained = (math.log(perplexity[key]) for key in ("full_precision", "converted", "trained"))
    gap = {"log_ratio_trained": trained - full}
    return gap if converted <= full else {"recovered_share": (converted - trained) / (converted - full), **gap}
