"""The model card: what the model is, where it comes from, what it reached, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from qat.config import QuantConfig

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")  # float32, as the config says
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
```

Stock `transformers` (with `accelerate`) reads this folder. On a CPU, set `TORCHDYNAMO_DISABLE=1`: its unpacking is compiled
at the first call otherwise. In bfloat16 the scales are rounded and perplexity changes a little{cast}."""


def model_card(card: Mapping[str, Any], quant: QuantConfig, linear_class: str, padding: str | None = None) -> str:
    """README.md with YAML front matter.

    Args:
        card: any of `name`, `base_model`, `license`, `recipe`, `note` (strings) and `results` (name -> number or text).
        quant: how the layers were quantized.
        linear_class: the scale convention of the folder.
        padding: a sentence about padded widths.
    """
    name = str(card.get("name") or "model")
    base = card.get("base_model")
    parts = [_front_matter(card), f"# {name}", _about(base, card, quant, linear_class)]
    if card.get("results"):
        parts.append("## Results\n\n" + _table(card["results"]))
    cast = "; add `.to(torch.bfloat16)` after loading so" if linear_class == "autobitlinear" else ""
    parts.append("## Loading\n\n" + _LOAD.format(name=name, cast=cast))
    if padding:
        parts.append("## Padding\n\n" + padding)
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Mapping[str, Any]) -> str:
    """A JSON string is a YAML string. The hub takes only hub ids as base_model."""
    base = card.get("base_model")
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if base and _HUB_ID.fullmatch(str(base)):
        lines.append(f"base_model: {json.dumps(str(base))}")
    if card.get("license"):
        lines.append(f"license: {json.dumps(str(card['license']))}")
    return "\n".join(["---", *lines, "tags:", "- bitnet", "- ternary", "- 1.58-bit", "- qat", "---"])


def _about(base: Any, card: Mapping[str, Any], quant: QuantConfig, linear_class: str) -> str:
    rows = {
        "base model": base or "not stated",
        "license": card.get("license") or "not stated",
        "recipe": card.get("recipe") or "not stated",
        "weights": f"{quant.weight}, {quant.scale} scale per {quant.granularity}, scale rounded to {quant.scale_dtype}",
        "activations": f"int{quant.act_bits} per {quant.act_granularity}",
        "format": f"transformers `quant_method: bitnet`, `linear_class: {linear_class}`",
    }
    text = "Fine-tuned with the quantization in the loop by qat.\n\n" + _table(rows)
    return f"{text}\n\n{card['note']}" if card.get("note") else text


def _table(rows: Mapping[str, Any]) -> str:
    shown = {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in rows.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in shown.items())])
