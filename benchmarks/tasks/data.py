"""The data of the tasks beside this file, read from local files as their authors publish them: no hub, no copy here.

QAT_TASK_DATA (python -m qat.evaluate --task-data DIR) names a folder with `piqa/valid.jsonl` and `piqa/valid-labels.lst`,
`arc_easy/arc_easy_test.jsonl`, `blimp/*.jsonl`; only those of the tasks that are asked for need to be there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset


def _folder(name: str) -> Path:
    if "QAT_TASK_DATA" not in os.environ:
        raise ValueError("these tasks read local files: give their folder as --task-data DIR")
    folder = Path(os.environ["QAT_TASK_DATA"]) / name
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    return folder


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def piqa(**_: Any) -> dict[str, Dataset]:
    """Two ways to reach a goal, one of which works (arXiv:1911.11641)."""
    folder = _folder("piqa")
    labels = _lines(folder / "valid-labels.lst")
    rows = [{**row, "label": label} for row, label in zip(_lines(folder / "valid.jsonl"), labels, strict=True)]
    return {"test": Dataset.from_list(rows)}


def arc_easy(**_: Any) -> dict[str, Dataset]:
    """Grade-school science questions (arXiv:1803.05457)."""
    rows = []
    for row in _lines(_folder("arc_easy") / "arc_easy_test.jsonl"):
        choices = row["question"]["choices"]
        label = [choice["label"] for choice in choices].index(row["answerKey"])
        rows.append({"question": row["question"]["stem"], "choices": [choice["text"] for choice in choices], "label": label})
    return {"test": Dataset.from_list(rows)}


def blimp(**_: Any) -> dict[str, Dataset]:
    """Pairs of a grammatical and an ungrammatical sentence (arXiv:1912.00582), of every file in the folder."""
    rows = [row for file in sorted(_folder("blimp").glob("*.jsonl")) for row in _lines(file)]
    return {"test": Dataset.from_list([{"good": row["sentence_good"], "bad": row["sentence_bad"]} for row in rows])}
