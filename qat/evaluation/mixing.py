"""A run's part of `quant.budget_bits`: measure on training text, keep the choice in its folder, give the layers theirs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import nn

from qat.config import TrainConfig
from qat.conversion.layers import bitlinears
from qat.conversion.overrides import gathered
from qat.conversion.record import Conversion
from qat.conversion.swap import swap
from qat.evaluation.budget import Budget, spend
from qat.metrics.perplexity import Window
from qat.nn.bitlinear import BitLinear
from qat.parallel import shared
from qat.storage import write_text

if TYPE_CHECKING:
    from qat.data import QATData

FILE = "budget.json"
_TOKENS = 2048
"""About so many of the training text: gains of layers differ by factors, and each token costs two passes a layer."""


def mix_components(
    config: TrainConfig, base: nn.Module, student: nn.Module, record: Conversion, data: QATData, folder: Path
) -> None:
    """Give the student's layers the components that the budget buys; `record` says so from then on. A resumed run keeps its own.

    Args:
        base: the model in full precision, in eval mode, where it is to be measured.
        student: its converted copy.

    Raises:
        ValueError: the folder's choice is damaged, or of another budget or layout.
    """
    if config.quant.budget_bits is None:
        return
    layers = {name: layer.config for name, layer in bitlinears(student)}
    budget = shared(lambda: _kept(config, folder / FILE, layers) or _spent(config, base, layers, data, folder))
    modules = dict(bitlinears(student))
    swap(student, {name: _with_two(modules[name]) for name in budget.chosen})
    record.config = gathered({name: layer.config for name, layer in bitlinears(student)})


def _spent(config: TrainConfig, base: nn.Module, layers: Any, data: QATData, folder: Path) -> Budget:
    """What the budget buys, which the folder keeps."""
    bits, layout = config.quant.budget_bits, config.export.layout
    assert bits is not None
    found = spend(base, layers, calibration(data), bits, layout, progress=config.trainer.progress)
    write_text(folder / FILE, json.dumps(found.to_dict(), indent=2))
    Console(highlight=False).print(found.table())
    return found


def _with_two(layer: BitLinear) -> nn.Module:
    """The layer as the sum of two ternary matrices, with its own parameters and norm."""
    new = BitLinear.from_linear(layer, replace(layer.config, components=2))
    new.rms_norm = layer.rms_norm
    return new


def calibration(data: QATData, tokens: int = _TOKENS) -> list[Window]:
    """The first training sequences, about so many tokens, in the order of the run, each a window of its own."""
    order, found = data.order(), []
    for position in range(min(math.ceil(tokens / data.train.length), len(data.train))):
        item = data.train[order(position)]
        ids = item["input_ids"][item["attention_mask"].bool()] if "attention_mask" in item else item["input_ids"]
        found.append((ids[None], 1))
    return found


def _kept(config: TrainConfig, file: Path, layers: Mapping[str, object]) -> Budget | None:
    if not file.is_file():
        return None
    try:
        found = Budget.from_dict(json.loads(file.read_text(encoding="utf-8")))
        names = [one.name for one in found.shares]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged, which holds the layers that quant.budget_bits chose: {error}") from error
    if (found.bits, found.layout) != (config.quant.budget_bits, config.export.layout):
        now = f"quant.budget_bits={config.quant.budget_bits} in export.layout={config.export.layout}"
        raise ValueError(f"{file} was chosen for {found.bits} bits in {found.layout}, so the run cannot go on with {now}")
    if names != list(layers):
        raise ValueError(f"{file} is of other layers than this model's")
    return found
