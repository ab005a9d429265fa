"""What a run reports: RunResult, which is result.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from qat.reporting.scores import Scores
from qat.reporting.staged import Staged
from qat.storage import parse_json, write_text

_RATIO = "ln(trained / full precision)"


@dataclass(frozen=True)
class Perplexity(Staged):
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
    measure: ClassVar[str] = "perplexity"
    gap_title: ClassVar[str] = "gap, nats\na token"

    @property
    def title(self) -> str:
        """The text and how much of it, the head of a column."""
        return f"{self.text}\n{self.tokens:,} tokens"

    @property
    def words(self) -> str:
        """What is measured, for people."""
        return f"perplexity, context {self.context}, stride {self.stride}"

    def shown(self, value: float) -> str:
        """A value, for people."""
        return f"{value:,.3f}"

    def gap(self, value: float) -> str:
        """To full precision, in nats a token, for people; empty where there is nothing to compare with."""
        full = self.get("full_precision")
        return "" if full is None or value == full else f"{math.log(value / full):+.3f}"

    def lines(self) -> list[str]:
        """A share above 1 is ordinary where the text is new to the model, and reads like a mistake: it is said in words."""
        shares = self.recovered()
        if "recovered_share" not in shares:
            return []
        share, ratio = shares["recovered_share"], shares["log_ratio_trained"]
        much = f"{share:.1%} of" if share <= 1 else "more than"
        return [f"recovered  {much} the log-perplexity lost by conversion on {self.text}; {_RATIO} = {ratio:.3f}"]

    def key(self, name: str) -> str:
        """Of a further text, in result.json."""
        return f"perplexity_{name}"

    def name(self, key: str) -> str:
        """The inverse of `key`."""
        return key.removeprefix("perplexity_")

    def recovered(self) -> dict[str, float]:
        """As the function of this name."""
        return recovered(self)


Stages = Perplexity | Scores
"""What a run measured of one text or one set of examples at each of its stages."""


@dataclass(frozen=True)
class RunResult:
    """Everything a run measured. A key is absent for what was not run; nothing is null for what failed."""

    status: str = "running"
    recipe: str = ""
    folder: str = ""
    perplexity: Perplexity = field(default_factory=Perplexity)
    """On the recipe's evaluation text."""
    accuracy: Scores = field(default_factory=Scores)
    """On the recipe's validation examples, of a run that classifies."""
    further: dict[str, Stages] = field(default_factory=dict)
    """Name -> the same for a further text; in JSON as `perplexity_<name>`, `accuracy_<name>` or `f1_<name>`."""
    packed_from: dict[str, Any] = field(default_factory=dict)
    """Whose weights were packed: `checkpoint` (last or best), `step`, `of_steps`; of the best one `metric` and `value`."""
    data: dict[str, Any] = field(default_factory=dict)
    """What there was to learn from, and what of it was cut, dropped or left over (`qat.data.account`)."""
    conversion: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    """Of a start from calibrated codes: tokens, seconds, error."""
    export: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    """Where it was pushed: `repo`, `url`, `commit`, number of `files`."""
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    control: dict[str, Any] = field(default_factory=dict)
    seconds_total: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    config_hash: str = ""
    signal: int | None = None
    """The signal that interrupted the run; not in JSON."""

    @property
    def weights(self) -> str:
        """Whose weights were packed, for people; empty where none were yet."""
        about = self.packed_from
        if not {"step", "of_steps"} <= about.keys():
            return ""
        if "metric" not in about:
            return f"of step {about['step']:,}, the last"
        value = f" ({about['value']:.4g})" if "value" in about else ""
        return f"of step {about['step']:,} of {about['of_steps']:,}, where {about['metric']} was best{value}"

    @property
    def measured(self) -> Stages:
        """What the run's task is judged by, on its own text or examples."""
        return self.accuracy if self.accuracy.text else self.perplexity

    @property
    def objective(self) -> float | None:
        """What a search minimises: the trained model's perplexity, or its share of wrong labels; None before it is trained."""
        trained = self.measured.get("trained")
        return trained if trained is None or self.measured is self.perplexity else 1 - trained

    @property
    def minimised(self) -> float | None:
        """What a search is told: ln(trained / full precision), by which models and texts compare; without these, `objective`."""
        return self.measured.recovered().get("log_ratio_trained", self.objective)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; sections that were not run are left out."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("further", "signal")}
        plain |= {"perplexity": self.perplexity.to_dict(), "accuracy": self.accuracy.to_dict()}
        kept = {key: value for key, value in plain.items() if value not in (None, {}, "")}
        further = {value.key(name): value.to_dict() for name, value in self.further.items()}
        return {**kept, **further, **self.measured.recovered()}

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
        names = {one.name for one in fields(RunResult)} - {"further", "signal", *KINDS}
        known = {key: value for key, value in values.items() if key in names}
        return RunResult(**_measured(values), **known)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


KINDS: dict[str, type[Perplexity] | type[Scores]] = {"perplexity": Perplexity, "accuracy": Scores, "f1": Scores}
"""What the keys of measured texts begin with."""


def _measured(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of RunResult that hold what was measured, of result.json's values."""
    found = {
        key: KINDS[key.partition("_")[0]].from_dict(value) for key, value in values.items() if key.partition("_")[0] in KINDS
    }
    own: dict[str, Any] = {key: found.pop(key) for key in ("perplexity", "accuracy") if key in found}
    return {**own, "further": {value.name(key): value for key, value in found.items()}}


def recovered(perplexity: Mapping[str, float]) -> dict[str, float]:
    """How much of the log-perplexity lost by conversion the training recovered, and ln(trained / full precision).

    Nothing where one is missing, or not finite.
    """
    values = [perplexity.get(key, 0.0) for key in ("full_precision", "converted", "trained")]
    if not all(0 < value < math.inf for value in values):
        return {}
    full, converted, trained = map(math.log, values)
    gap = {"log_ratio_trained": trained - full}
    return gap if converted <= full else {"recovered_share": (converted - trained) / (converted - full), **gap}
