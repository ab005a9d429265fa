"""What a run leaves on disk: the packed folder, always, and each export that can hold the model, read back and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.config import TrainConfig
from qat.conversion.record import Conversion
from qat.formats import FORMATS, get_format
from qat.formats.packed import folder as packed
from qat.formats.tensors import packed_layers
from qat.metrics.perplexity import Window
from qat.models import hub as models
from qat.reporting.result import RunResult
from qat.training.stages import Measure

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_packed(
    config: TrainConfig, model: PreTrainedModel, record: Conversion, folder: Path, tokenizer: Any, result: RunResult
) -> None:
    """Write <run>/packed and note its sizes, whole file and linear layers alone."""
    card = {**models.describe_source(config.model), "recipe": config.run.name}
    packed.save(model, folder / "packed", record, tokenizer, extra={"card": card}, floats=config.export.floats)
    linears_bf16 = sum(2 * layer.in_features * layer.out_features for layer in packed_layers(model).values())
    result.bytes |= {**packed.sizes(folder / "packed"), "linears_bf16": linears_bf16}


def export_all(
    config: TrainConfig, model: PreTrainedModel, folder: Path, tokenizer: Any, result: RunResult, measure: Measure
) -> None:
    """Write and verify every format of export.formats; one that cannot hold the model is named with the reason.

    Raises:
        ValueError: what the stock reader gives differs from what was packed.
    """
    result.export = {"done": [], "skipped": {}}
    for name in config.export.formats:
        reason = _export(name, config, model, folder, tokenizer, result, measure)
        if reason is None:
            result.export["done"].append(name)
        else:
            result.export["skipped"][name] = reason


def _export(
    name: str, config: TrainConfig, model: PreTrainedModel, folder: Path, tokenizer: Any, result: RunResult, measure: Measure
) -> str | None:
    """Write one format into the run's folder, or return why it cannot hold the model."""
    target, code = FORMATS[name], get_format(name)
    options = target.of_run(config.export)
    if reason := code.unsupported(model, tokenizer, **options):
        return reason
    further = {text: _windows(measure, text) for text in measure.texts if text} if target.is_a_stage else {}
    more, batches = {"further": further} if further else {}, _windows(measure)
    info = code.save(
        model,
        folder / target.in_run,
        tokenizer,
        **options,
        card=lambda found: {**_card(config), "results": _card_results(result, found)},
        check=lambda written: code.read_back(written, model, measure.probe(), batches, **more),
    )
    found, (facts, lines) = info["verification"], code.recorded(info)
    if target.is_a_stage:
        result.perplexity.setdefault("exported", found["perplexity"])
        for text, value in found.get("further", {}).items():
            result.further[text].setdefault("exported", value)
    if target.suffix:
        result.bytes[name] = info["bytes"]
    result.verify({name: facts, "summary": lines})
    return None


def _card(config: TrainConfig) -> dict[str, Any]:
    return {**models.describe_source(config.model), "recipe": config.run.name, "name": config.run.name}


def _windows(measure: Measure, text: str = "") -> list[Window]:
    return measure.windows[text]


def _card_results(result: RunResult, found: dict[str, Any]) -> dict[str, Any]:
    values = {**result.perplexity, **({"exported": found["perplexity"]} if "perplexity" in found else {})}
    kept = ("full_precision", "converted", "trained", "packed", "exported")
    stages = {key: round(values[key], 4) for key in kept if key in values}
    return {f"perplexity, {key.replace('_', ' ')}": value for key, value in stages.items()} | {
        "text": values["text"],
        "context": values["context"],
        "stride": values["stride"],
    }
