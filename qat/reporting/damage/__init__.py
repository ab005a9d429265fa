"""The damage map of a model on a text: measured, drawn as the page has it, and written as JSON."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.config import TrainConfig
from qat.conversion import walker
from qat.conversion.layers import bitlinears
from qat.data import text_tokens
from qat.evaluation.damage import DamageMap, damage_map
from qat.evaluation.remedies import Remedy, remedies
from qat.metrics.perplexity import windows
from qat.models import hub
from qat.reporting.damage.picture import KINDS, draw
from qat.reporting.page.health import damage_blocks
from qat.reporting.page.parts import Cell, Section, Table, megabytes, name_cell
from qat.reporting.page.render import page
from qat.reporting.page.verdict import Number, Verdict
from qat.storage import write_text
from qat.tasks import TASKS


@dataclass(frozen=True)
class Damaged:
    """What was measured."""

    model: str
    text: str
    map: DamageMap
    remedies: Sequence[Remedy]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: the map's keys, and what would help."""
        about = {"model": self.model, "text": self.text}
        return {**about, **self.map.to_dict(), "remedies": [one.to_dict() for one in self.remedies]}


def measured(config: TrainConfig, text: str, tokens: int, progress: bool = True) -> Damaged:
    """Load the model of a configuration, and measure each layer that it would convert on the first `tokens` of a text.

    Raises:
        ValueError: a model, a text or a value that cannot work.
    """
    if not TASKS[config.task].generates:
        raise ValueError(f"damage is measured by the next token, which task={config.task} does not learn")
    if tokens < 2:
        raise ValueError(f"--tokens {tokens} is not allowed; it must be at least 2")
    tokenizer = hub.load_tokenizer(config.model)
    base = hub.load_model(config.model).eval()
    hub.check_vocabulary(base, tokenizer)
    context = min(config.eval.context or config.data.sequence_length, hub.context_length(base) or 2**31)
    scored = list(windows(text_tokens(text, tokenizer, config.data, tokens), context, None, 1))
    student = copy.deepcopy(base)
    walker.convert(student, config.quant, include=config.model.include or None, exclude=config.model.exclude or None)
    layers = {name: layer.config for name, layer in bitlinears(student)}
    del student
    found = damage_map(base, layers, scored, progress=progress)
    helped = remedies(base, layers, found, scored, config.export.layout, progress=progress)
    return Damaged(config.model.path or "", text, found, helped)


def save(found: Damaged, out: Path | None, picture: Path | None) -> list[Path]:
    """Write JSON and picture where they are asked for; the files."""
    if out:
        write_text(out, json.dumps(found.to_dict(), indent=2) + "\n")
    if picture:
        _draw(found, picture)
    return [file for file in (out, picture) if file]


def _draw(found: Damaged, file: Path) -> None:
    if file.suffix not in KINDS:
        return write_text(file, drawn(found))
    layers = {name: one.kl for name, one in found.map.layers.items()}
    return draw(f"{found.model} on {found.text}, {found.map.tokens:,} tokens", layers, found.remedies, file)


def drawn(found: Damaged) -> str:
    """The map as a page."""
    worst = found.remedies[0] if found.remedies else None
    total = found.map.forms["both"]
    said = f"Quantizing all layers takes perplexity from {found.map.full_precision.perplexity:,.4g} to {total.perplexity:,.4g}."
    if worst:
        said += f" Alone, {worst.layer} does the most damage."
    head = [Number(f"{total.kl:,.3g}", "KL of all layers, nats a token"), Number(f"{len(found.map.layers):,}", "layers")]
    sections = [
        Section("damage", "Damage map", damage_blocks(found.map.to_dict())),
        Section("remedies", "What would help the worst layers", [_table(found.remedies)]),
    ]
    return page("Damage map", [found.model, found.text], Verdict(said, "quiet"), head, sections)


def _table(found: Sequence[Remedy]) -> Table:
    rows = [
        [
            name_cell(one.layer),
            Cell(f"{one.kl:.3g}"),
            Cell(f"+{megabytes(one.exclude_bytes)}"),
            Cell("" if one.second_kl is None else f"{one.second_kl:.3g}"),
            Cell("" if one.second_kl is None else f"+{megabytes(one.second_bytes)}"),
        ]
        for one in found
    ]
    return Table(["layer", "KL alone", "left out costs", "KL with 2 components", "which cost"], rows)
