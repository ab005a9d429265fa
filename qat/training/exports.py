"""What a run leaves on disk: the packed folder, always, and each export that can hold the model, read back and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.config import TrainConfig
from qat.conversion.layers import packed_layers
from qat.conversion.record import Conversion
from qat.formats import FORMATS, get_format
from qat.formats.packed import folder as packed
from qat.models import hub as models
from qat.tasks import TASKS
from qat.terminal.stage import stage
from qat.training.stages import Measure as TextMeasure
from qat.training.tasks import Measure

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_packed(config: TrainConfig, model: PreTrainedModel, record: Conversion, folder: Path, tokenizer: Any) -> dict[str, int]:
    """Write <run>/packed; its sizes in bytes, whole file and linear layers alone."""
    card = {**models.describe_source(config.model), "recipe": config.run.name}
    with stage("writing packed/"):
        packed.save(model, folder / "packed", record, tokenizer, extra={"card": card}, floats=config.export.floats)
    linears_bf16 = sum(2 * layer.in_features * layer.out_features for layer in packed_layers(model).values())
    return {**packed.sizes(folder / "packed"), "linears_bf16": linears_bf16}


def unwritten(config: TrainConfig, student: PreTrainedModel, tokenizer: Any) -> list[str]:
    """What is to be said, before anything is trained, of the formats of export.formats that cannot hold such a model."""
    found = {name: _reason(name, config, student, tokenizer) or _mixed(name, config) for name in config.export.formats}
    return [f"warning: export.formats={name} will not be written: {reason}" for name, reason in found.items() if reason]


def _reason(name: str, config: TrainConfig, model: PreTrainedModel, tokenizer: Any) -> str | None:
    """Why the format cannot hold a model, packed or still to be trained; None where it can."""
    target = FORMATS[name]
    if unread := TASKS[config.task].unread:
        return unread
    reason: str | None = get_format(name).unsupported(model, tokenizer, **target.of_run(config.export))
    return reason


def _mixed(name: str, config: TrainConfig) -> str | None:
    """Why it cannot hold what the layers' components will be, which are measured later."""
    if config.quant.budget_bits is None or "planes" in FORMATS[name].room:
        return None
    return "quant.budget_bits gives layers a second component, and the format holds one ternary matrix a layer"


@dataclass(frozen=True)
class Exported:
    """One format: written and read back, or `skipped` with the reason why it cannot hold the model."""

    name: str
    skipped: str | None = None
    perplexity: dict[str, float] = field(default_factory=dict)
    """Text -> perplexity as its stock reader gives it; empty where the format is no stage of the result."""
    bytes: int | None = None
    """Of an export that is one file."""
    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    """What was compared, for people."""


def export_all(
    config: TrainConfig, model: PreTrainedModel, folder: Path, tokenizer: Any, measure: Measure, stages: Mapping[str, float]
) -> list[Exported]:
    """Write and verify every format of export.formats. `stages` are the perplexities so far, for the model cards.

    Raises:
        ValueError: what the stock reader gives differs from what was packed.
    """
    found = []
    for name in config.export.formats:
        with stage(f"exporting {name} and reading it back"):
            found.append(_export(name, config, model, folder, tokenizer, measure, stages))
    return found


def _export(
    name: str,
    config: TrainConfig,
    model: PreTrainedModel,
    folder: Path,
    tokenizer: Any,
    measure: Measure,
    stages: Mapping[str, float],
) -> Exported:
    if reason := _reason(name, config, model, tokenizer):
        return Exported(name, skipped=reason)
    target, code = FORMATS[name], get_format(name)
    options = target.of_run(config.export)
    assert isinstance(measure, TextMeasure)
    further = {text: scored for text, scored in measure.windows.items() if text} if target.is_a_stage else {}
    more = {"further": further} if further else {}
    info = code.save(
        model,
        folder / target.in_run,
        tokenizer,
        **options,
        card=lambda found: {**_card(config), "results": _card_results(measure, stages, found)},
        check=lambda written: code.read_back(written, model, measure.probe(), measure.windows[""], **more),
    )
    found, (facts, lines) = info["verification"], code.recorded(info)
    values = {"": found["perplexity"], **found.get("further", {})} if target.is_a_stage else {}
    return Exported(name, None, values, info["bytes"] if target.suffix else None, facts, lines)


def _card(config: TrainConfig) -> dict[str, Any]:
    return {**models.describe_source(config.model), "recipe": config.run.name, "name": config.run.name}


def _card_results(measure: TextMeasure, stages: Mapping[str, float], found: dict[str, Any]) -> dict[str, Any]:
    values = {**stages, **({"exported": found["perplexity"]} if "perplexity" in found else {})}
    kept = ("full_precision", "converted", "trained", "packed", "exported")
    shown = {f"perplexity, {key.replace('_', ' ')}": round(values[key], 4) for key in kept if key in values}
    return {**shown, "text": measure.about[""].text, "context": measure.context, "stride": measure.stride}
