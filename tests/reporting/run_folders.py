"""Folders as runs leave them, written by hand: as large, as broken and as far along as a test needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = """model:
  path: a/model
quant:
  weight: ternary
  granularity: {granularity}
data:
  kind: text
  train: text.txt
  batch_size: 4
  sequence_length: 64
optim:
  lr: {lr}
  warmup_steps: 10
trainer:
  max_steps: 100
  accumulate_grad_batches: 1
run:
  name: {name}
"""
RESULT: dict[str, Any] = {
    "status": "done",
    "recipe": "tiny",
    "perplexity": {
        "text": "valid.txt",
        "tokens": 1000,
        "context": 64,
        "stride": 64,
        "full_precision": 4.0,
        "converted": 400.0,
        "trained": 5.0,
        "packed": 5.0,
    },
    "conversion": {"summary": "7 of 8 linear layers converted", "skipped": {"lm_head": "tied"}},
    "verification": {"packed_max_logit_difference": 0.0, "summary": ["packed = trained to the bit (logits and perplexity)"]},
    "bytes": {"full_precision_bf16": 500_000, "packed_model": 100_000, "linears_bf16": 400_000, "packed_linears": 50_000},
    "tokens": 25_600,
    "seconds": 10.0,
    "tokens_per_second": 2560.0,
    "versions": {"qat": "0.1.0"},
    "config_hash": "abc",
}
ROWS = [{"step": step, "train/loss": 4 - step / 40, "train/ce": 3 - step / 50, "val/ce": 2.0} for step in range(10, 101, 10)]


def write_run(
    folder: Path, result: dict[str, Any] | None = RESULT, rows: list[dict[str, Any]] | None = ROWS, **config: Any
) -> Path:
    """A run's folder with its config.yaml, and what of the other two files is given."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"granularity": "tensor", "lr": 0.003, "name": "tiny", **config}
    (folder / "config.yaml").write_text(CONFIG.format(**said))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    if rows:
        names = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def with_trained(value: float, packed: int = 100_000) -> dict[str, Any]:
    """A result whose trained model has that perplexity and size."""
    perplexity = {**RESULT["perplexity"], "trained": value, "packed": value}
    return {**RESULT, "perplexity": perplexity, "bytes": {**RESULT["bytes"], "packed_model": packed}}
