"""What a run reports: RunResult, which is result.json, and the table at the end in the terminal."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from qat.storage import write_text as write_text

STAGES = {
    "full_precision": "full precision",
    "control": "control, fine-tuned",
    "converted": "converted, not trained",
    "trained": "after QAT",
    "packed": "packed",
    "exported": "read back from the export",
}


@dataclass
class RunResult:
    """Everything a run measured. A key is absent for what was not run; nothing is null for what failed."""

    status: str = "running"
    recipe: str = ""
    folder: str = ""
    perplexity: dict[str, Any] = field(default_factory=dict)
    """stage -> perplexity on the recipe's evaluation text, and its `text`, `context`, `stride`, `tokens`."""
    further: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same for further texts; in JSON as `perplexity_<name>`."""
    conversion: dict[str, Any] = field(default_factory=dict)
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
        data = {key: value for key, value in asdict(self).items() if value not in (None, {}, "")}
        further = data.pop("further", {})
        data.pop("signal", None)
        shares = recovered(self.perplexity)
        return {**data, **{f"perplexity_{name}": value for name, value in further.items()}, **shares}

    def to_json(self) -> str:
        """result.json."""
        return json.dumps(self.to_dict(), indent=2)

    def count(self, outcome: Any) -> None:
        """Note tokens and seconds of a `qat.training.fit.FitResult`."""
        self.tokens, self.seconds = outcome.tokens, outcome.seconds
        self.tokens_per_second = outcome.tokens_per_second

    def verify(self, found: dict[str, Any]) -> None:
        """Add a comparison that held; `summary` holds lines for people."""
        summary = [*self.verification.get("summary", []), *found.get("summary", [])]
        self.verification = {**self.verification, **found, "summary": summary}

    def save(self, folder: Path) -> None:
        """Write result.json whole or not at all."""
        write_text(folder / "result.json", self.to_json() + "\n")


def read_result(folder: Path) -> RunResult | None:
    """The result.json of a run; None where there is none that can be read."""
    try:
        values = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        names = {one.name for one in fields(RunResult)} - {"further", "signal"}
        further = {key.removeprefix("perplexity_"): value for key, value in values.items() if key.startswith("perplexity_")}
        return RunResult(**{key: value for key, value in values.items() if key in names}, further=further)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def recovered(perplexity: dict[str, Any]) -> dict[str, float]:
    """How much of the log-perplexity lost by conversion the training recovered, and ln(trained / full precision)."""
    if not {"full_precision", "converted", "trained"} <= perplexity.keys():
        return {}
    full, converted, trained = (math.log(perplexity[key]) for key in ("full_precision", "converted", "trained"))
    gap = {"log_ratio_trained": trained - full}
    return gap if converted <= full else {"recovered_share": (converted - trained) / (converted - full), **gap}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def print_table(result: RunResult) -> None:
    """The table that a person reads at the end of a run."""
    from rich.console import Console

    console = Console(highlight=False)
    about = result.perplexity
    console.print(f"{result.recipe}: perplexity, context {about.get('context')}, stride {about.get('stride')}")
    console.print(_perplexity_table(result))
    for line in _lines(result):
        console.print(line, soft_wrap=True, markup=False)


def _perplexity_table(result: RunResult) -> Any:
    from rich.table import Table

    about = result.perplexity
    table = Table()
    table.add_column("model", no_wrap=True)
    texts = {str(about.get("text")): about, **{str(value["text"]): value for value in result.further.values()}}
    for name, values in texts.items():
        table.add_column(f"{name}\n{values['tokens']:,} tokens", justify="right")
    for key, label in STAGES.items():
        if key in about:
            table.add_row(label, *(f"{values[key]:,.3f}" if key in values else "" for values in texts.values()))
    return table


def _lines(result: RunResult) -> list[str]:
    lines = []
    shares = recovered(result.perplexity)
    if "recovered_share" in shares:
        lines.append(
            f"recovered  {shares['recovered_share']:.1%} of the log-perplexity lost by conversion on {result.perplexity['text']};"
        )
        lines[-1] += f" ln(trained / full precision) = {shares['log_ratio_trained']:.3f}"
    if "packed_model" in result.bytes:
        lines.append(_size_line(result.bytes))
    if result.tokens:
        assert result.seconds is not None and result.tokens_per_second is not None
        lines.append(f"training   {result.tokens:,} tokens in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s")
    if "summary" in result.conversion:
        lines.append(f"layers     {result.conversion['summary']}")
    lines += [f"verified   {text}" for text in result.verification.get("summary", [])]
    lines += [f"exported   {name}" for name in result.export.get("done", [])]
    lines += [f"skipped    export {name}: {reason}" for name, reason in result.export.get("skipped", {}).items()]
    return [*lines, f"run        {result.folder} ({result.status})"]


def _size_line(size: dict[str, int]) -> str:
    whole, packed = size["full_precision_bf16"], size["packed_model"]
    line = f"size       whole model {_megabytes(whole)} in bf16, {_megabytes(packed)} packed ({whole / packed:.1f}x)"
    if "linears_bf16" in size:
        before, after = size["linears_bf16"], size["packed_linears"]
        line += f"; its linear layers {_megabytes(before)} -> {_megabytes(after)} ({before / after:.1f}x)"
    return line
