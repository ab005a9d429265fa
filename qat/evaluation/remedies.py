"""What would help the layers that quantization harms most: to leave one out, or a second component; and what that costs.

A layer that is left out (`model.exclude`) does no damage and takes two bytes a weight in place of its codes. A second component
(`quant.overrides`) is measured: the layer alone, as the sum of two matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from shlex import quote
from typing import Any

from rich.table import Column, Table
from torch import nn

from qat.config import QuantConfig
from qat.evaluation.budget import component_bits
from qat.evaluation.damage import DamageMap, Meter, shown
from qat.metrics.perplexity import Window
from qat.quantizers import find

_HALF = 16
"""Bits a weight of a layer that is left out."""


@dataclass(frozen=True)
class Remedy:
    """One layer. KL in nats a token, alone; bytes are those of codes, scales not counted."""

    layer: str
    weights: int
    kl: float
    exclude_bytes: int
    """What the file grows by where the layer is left out, in bf16."""
    second_kl: float | None
    """KL with a second component; None where the quantizer has no sum."""
    second_bytes: int
    """What the file grows by with a second component."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def remedies(
    model: nn.Module,
    layers: Mapping[str, QuantConfig],
    found: DamageMap,
    windows: Sequence[Window],
    layout: str,
    most: int = 10,
    *,
    progress: bool = False,
) -> list[Remedy]:
    """Of the `most` layers that do the most damage alone, the worst first. The model is in full precision and eval mode.

    Raises:
        ValueError: no token is scored, or a logit is not finite.
    """
    worst = sorted(found.layers, key=lambda name: -found.layers[name].kl)[:most]
    meter, modules = Meter(model, windows), dict(model.named_modules(remove_duplicate=False))
    made = []
    for name in shown(worst, "second components", "layers", progress):
        config, weights = layers[name], modules[name].weight.numel()  # type: ignore[union-attr]
        bits = component_bits(layout)
        more = replace(config, components=2) if config.planes == 1 and find(config.weight, 2, config.component_scales) else None
        second = meter({name: more}).kl if more else None
        grown = round(weights * (_HALF - bits * config.planes) / 8)
        made.append(Remedy(name, weights, found.layers[name].kl, grown, second, round(weights * bits / 8)))
    return made


def remedies_table(found: Sequence[Remedy]) -> Table:
    """What a person reads."""
    table = Table(Column("layer", overflow="fold"), title="what would help the worst layers, in nats a token and bytes")
    for name in ("KL alone", "left out: bytes", "2 components: KL", "bytes"):
        table.add_column(name, justify="right")
    for one in found:
        second = ("no sum", "") if one.second_kl is None else (f"{one.second_kl:.3g}", f"+{one.second_bytes:,}")
        table.add_row(one.layer, f"{one.kl:.3g}", f"+{one.exclude_bytes:,}", *second)
    return table


def settings(found: Sequence[Remedy]) -> list[str]:
    """The settings for the worst layer, as they are typed; a second component where it takes most of the damage away."""
    if not found:
        return []
    worst = found[0]
    lines = [quote(f"model.exclude=[{worst.layer}]")]
    if worst.second_kl is not None and worst.second_kl < worst.kl / 2:
        lines.append(quote(f"quant.overrides={{{worst.layer}:{{components:2}}}}"))
    return lines
