"""Who a run is to its trackers: an id that its folder keeps, and what it was started with."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from qat.config import TrainConfig
from qat.conversion.layers import parameter_count
from qat.conversion.record import Conversion
from qat.reporting.origin import command, commit
from qat.storage import parse_json, write_text
from qat.training.loggers.record import About

FILE = "tracking.json"
"""In the run's folder: its id, and tracker -> the id that it gave the run."""


def identity(folder: Path) -> tuple[str, dict[str, str]]:
    """The run's id, made at its first start, and the ids that trackers gave it.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12], {}  # the former where a W&B agent started it
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
        known = {str(key): str(value) for key, value in values["known"].items()}
        return str(values["id"]), known
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it, and the run is tracked as a new one") from error


def keep(about: About, known: dict[str, str]) -> About:
    """Write the ids into the folder, whole or not at all."""
    about = replace(about, known={**about.known, **known})
    write_text(about.folder / FILE, json.dumps({"id": about.id, "known": about.known}) + "\n")
    return about


def about(config: TrainConfig, folder: Path, record: Conversion, base: nn.Module, versions: dict[str, str]) -> About:
    """What trackers are told before the run trains."""
    own, known = identity(folder)
    name = f"{config.run.name} {config.run.job or ''}".strip()
    facts = {"command": command(), "commit": commit(), "versions": versions, "model": model_facts(record, base)}
    run = config.run
    return About(own, name, folder, run.group, run.job_type, run.tags, known, plain(asdict(config)), facts)


def model_facts(record: Conversion, base: nn.Module) -> dict[str, Any]:
    """Numbers by which runs of different models are told apart."""
    return {
        "type": getattr(getattr(base, "config", None), "model_type", type(base).__name__),
        "parameters": parameter_count(base),
        "converted_layers": len(record.converted),
        "skipped_layers": len(record.skipped),
    }


def plain(node: Any) -> Any:
    """Without what trackers cannot hold: tuples become lists, keys become text, and loggers' own secrets stay here."""
    if isinstance(node, dict):
        return {str(key): plain(value) for key, value in node.items() if "key" not in str(key).lower().split("_")}
    if isinstance(node, list | tuple):
        return [plain(one) for one in node]
    return node if isinstance(node, str | int | float | bool | None) else str(node)
