"""What a run leaves on disk: the packed folder, always, and each export that can hold the model, read back and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.config import TrainConfig
from qat.conversion.record import Conversion
from qat.formats.bitnet import writing as hf
from qat.formats.packed import folder as packed
from qat.formats.tensors import packed_layers
from qat.metrics.perplexity import Window, windows
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
    packed.save(model, folder / "packed", record, tokenizer, extra={"card": card})
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
        reason = _EXPORTS[name](config, model, folder, tokenizer, result, measure)
        if reason is None:
            result.export["done"].append(name)
        else:
            result.export["skipped"][name] = reason


def _export_hf(
    config: TrainConfig, model: PreTrainedModel, folder: Path, tokenizer: Any, result: RunResult, measure: Measure
) -> str | None:
    """Write <run>/model, or return why the format cannot hold the model."""
    if reason := hf.unsupported(model):
        return reason
    batches, further = _windows(measure), {name: _windows(measure, name) for name in measure.texts if name}
    info = hf.save(
        model,
        folder / "model",
        tokenizer,
        linear_class=config.export.linear_class,
        card=lambda found: {**_card(config), "results": _card_results(result, found["perplexity"])},
        check=lambda written: hf.verify(written, model, measure.probe(), batches, further=further),
    )
    found = info["verification"]
    result.perplexity["exported"] = found["perplexity"]
    for name, value in found.get("further", {}).items():
        result.further[name]["exported"] = value
    result.verify({"hf": found, "summary": [_hf_summary(folder / "model", found)]})
    return None


def _export_gguf(
    config: TrainConfig, model: PreTrainedModel, folder: Path, tokenizer: Any, result: RunResult, measure: Measure
) -> str | None:
    """Write <run>/model.gguf, or return why the format cannot hold the model."""
    from qat.formats.gguf import writing as gguf
    from qat.formats.gguf.verify import comparisons

    kind = config.export.gguf_type
    if reason := gguf.unsupported(model, tokenizer, type=kind):
        return reason
    batches = _windows(measure)
    info = gguf.save(
        model,
        folder / "model.gguf",
        tokenizer,
        type=kind,
        floats=config.export.gguf_floats,
        card=_card(config),
        check=lambda written: gguf.verify(written, model, measure.probe(), batches),
    )
    facts = {key: info[key] for key in ("types", "scale_rounding", "verification")}
    result.verify({"gguf": facts, "summary": [f"model.gguf: {line}" for line in comparisons(info)]})
    result.bytes["gguf"] = info["bytes"]
    return None


_EXPORTS = {"hf": _export_hf, "gguf": _export_gguf}


def _card(config: TrainConfig) -> dict[str, Any]:
    return {**models.describe_source(config.model), "recipe": config.run.name, "name": config.run.name}


def _windows(measure: Measure, text: str = "") -> list[Window]:
    return list(windows(measure.texts[text], measure.context, measure.stride, measure.batch_size))


def _card_results(result: RunResult, exported: float) -> dict[str, Any]:
    values = {**result.perplexity, "exported": exported}
    kept = ("full_precision", "converted", "trained", "packed", "exported")
    stages = {key: round(values[key], 4) for key in kept if key in values}
    return {f"perplexity, {key.replace('_', ' ')}": value for key, value in stages.items()} | {
        "text": values["text"],
        "context": values["context"],
        "stride": values["stride"],
    }


def _hf_summary(folder: Path, found: dict[str, float]) -> str:
    line = f"{folder} = packed: stock transformers gives perplexity {found['perplexity']:.4f}"
    same = found["logits_difference"] == 0 and found["perplexity_difference"] == 0
    off = f"{found['perplexity_difference']:.1e} off, logits {found['logits_difference']:.1e} off"
    line += " and logits, equal to the bit" if same else f" ({off})"
    if "perplexity_bfloat16" in found:
        line += f"; loaded as bfloat16 {found['perplexity_bfloat16']:.4f}"
    return line
