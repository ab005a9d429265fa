"""The model card: what the model is, where it comes from, what it reached, and how to load it.

Its head is made by huggingface_hub, so that the hub reads it: the base model, the licence, and the numbers as a `model-index`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from qat.config import QuantConfig

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PIPELINES = {"language": "text-generation", "classification": "text-classification"}
"""Task -> what the hub calls it."""
_STAGES = ("exported", "packed", "trained")
"""Whose value is the model's own: the first of these that was measured."""

LOAD_STOCK = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}"{more})  # float32, as the config says
tokenizer = AutoTokenizer.from_pretrained("{where}"{more})
```

Stock `transformers` (with `accelerate`) reads this folder. On a CPU, set `TORCHDYNAMO_DISABLE=1`: its unpacking is compiled
at the first call otherwise. In bfloat16 the scales are rounded and perplexity changes a little{cast}."""


def stock_loading(linear_class: str, where: str = "path/of/this/folder", more: str = "") -> str:
    """How to load a folder of the format hf."""
    cast = "; add `.to(torch.bfloat16)` after loading so" if linear_class == "autobitlinear" else ""
    return LOAD_STOCK.format(where=where, more=more, cast=cast)


def model_card(card: Mapping[str, Any], quant: QuantConfig, linear_class: str, padding: str | None = None) -> str:
    """README.md of a folder of the format hf.

    Args:
        card: as of `written`.
        quant: how the layers were quantized.
        linear_class: the scale convention of the folder.
        padding: a sentence about padded widths.
    """
    about = {"format": f"transformers `quant_method: bitnet`, `linear_class: {linear_class}`"}
    sections = {"Loading": stock_loading(linear_class), **({"Padding": padding} if padding else {})}
    return written(card, quant, about, sections)


def written(card: Mapping[str, Any], quant: QuantConfig, about: Mapping[str, str], sections: Mapping[str, str]) -> str:
    """A card as text, with its YAML head.

    Args:
        card: any of `name`, `base_model`, `license`, `recipe`, `note`, `task` (strings), `results` (name -> number or text) and
            `evaluated` (a list of `text`, `measure` and `value`; without it, what `results` say of their `text`).
        quant: how the layers were quantized.
        about: further rows of the first table.
        sections: title -> what the card says below the results.
    """
    parts = [f"# {_name(card)}", _about(card, quant, about)]
    if card.get("results"):
        parts.append("## Results\n\n" + _table(card["results"]))
    parts += [f"## {title}\n\n{text}" for title, text in sections.items()]
    return str(ModelCard(f"---\n{_data(card).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _name(card: Mapping[str, Any]) -> str:
    return str(card.get("name") or "model")


def _data(card: Mapping[str, Any]) -> ModelCardData:
    """The hub takes only hub ids as base_model."""
    base, pipeline = str(card.get("base_model") or ""), _PIPELINES[card.get("task", "language")]
    from_hub: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"} if _HUB_ID.fullmatch(base) else {}
    found = [
        EvalResult(
            task_type=pipeline,
            dataset_type=re.sub(r"[^\w.-]+", "-", one["text"]) or "text",
            dataset_name=one["text"],
            metric_type=one["measure"],
            metric_value=one["value"],
        )
        for one in card.get("evaluated") or _evaluated(card.get("results") or {})
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        license=card.get("license") or None,
        tags=["bitnet", "ternary", "1.58-bit", "qat"],
        eval_results=found or None,
        model_name=_name(card) if found else None,
        **from_hub,
    )


def _evaluated(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The folder's own perplexity, where the results name the text."""
    plain = {key.removeprefix("perplexity, "): value for key, value in results.items()}
    values = [plain[stage] for stage in _STAGES if isinstance(plain.get(stage), int | float)]
    known = values and isinstance(plain.get("text"), str)
    return [{"text": plain["text"], "measure": "perplexity", "value": values[0]}] if known else []


def _about(card: Mapping[str, Any], quant: QuantConfig, more: Mapping[str, str]) -> str:
    rows = {
        "base model": card.get("base_model") or "not stated",
        "license": card.get("license") or "not stated",
        "recipe": card.get("recipe") or "not stated",
        "weights": f"{quant.weight}, {quant.scale} scale per {quant.granularity}, scale rounded to {quant.scale_dtype}",
        "activations": f"int{quant.act_bits} per {quant.act_granularity}",
        **more,
    }
    text = "Fine-tuned with the quantization in the loop by qat.\n\n" + _table(rows)
    return f"{text}\n\n{card['note']}" if card.get("note") else text


def _table(rows: Mapping[str, Any]) -> str:
    shown = {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in rows.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in shown.items())])
