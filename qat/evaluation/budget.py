"""Which layers get a second component where the model may take so many bits a weight (`quant.budget_bits`).

The gain of a layer is the damage that it does alone (KL to full precision, `qat.evaluation.damage`) as one ternary matrix, less
what it does as the sum of two. Layers are taken by gain for a bit, the largest first, one that no longer fits is passed over:
the greedy answer to the knapsack, whose exact one would be no better than the measure. The bits are those of the layout's
codes, 2 a component in 2bit and 8 / 5 in base3; scales, and what pads a row to whole bytes, are not counted.

Rejected: gains in a model that is quantized everywhere. Untrained, its perplexity is in the hundreds, and what one layer adds to
that says little of the model that training ends with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table
from torch import nn

from qat.config import QuantConfig
from qat.evaluation.damage import Meter, shown
from qat.metrics.perplexity import Window
from qat.quantizers import find
from qat.quantizers.layouts import get_layout

_MORE = 2
"""Components of a layer that is chosen."""


@dataclass(frozen=True)
class Share:
    """What one layer would gain by a second component, and how many it has."""

    name: str
    weights: int
    gain: float
    """KL in nats a token that its second component takes away."""
    components: int


@dataclass(frozen=True)
class Budget:
    """A budget as it was spent."""

    bits: float
    layout: str
    tokens: int
    """Scored tokens that the gains were measured on."""
    shares: tuple[Share, ...]

    @property
    def chosen(self) -> list[str]:
        """Layers that get a second component, in the model's order."""
        return [one.name for one in self.shares if one.components == _MORE]

    @property
    def spent(self) -> float:
        """Bits a weight, over the layers that were looked at."""
        return (
            component_bits(self.layout) * sum(s.components * s.weights for s in self.shares) / sum(s.weights for s in self.shares)
        )

    def to_dict(self) -> dict[str, Any]:
        """The budget as JSON has it; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Budget:
        """The inverse of `to_dict`; TypeError or KeyError for anything else."""
        return cls(**{**values, "shares": tuple(Share(**one) for one in values["shares"])})

    def table(self) -> Table:
        """What a person reads: the layers by gain for a weight."""
        table = Table(
            "layer", title=f"{len(self.chosen)} of {len(self.shares)} layers get 2 components: {self.spent:.3f} bits a weight"
        )
        for name in ("weights", "KL gained, nats", "components"):
            table.add_column(name, justify="right")
        for one in sorted(self.shares, key=lambda one: -one.gain / one.weights):
            table.add_row(one.name, f"{one.weights:,}", f"{one.gain:.3g}", str(one.components))
        return table


def component_bits(layout: str) -> float:
    """Bits a weight of one component in that layout, its rows' padding left out."""
    return get_layout(layout).bits


def check_budget(config: QuantConfig, layout: str) -> None:
    """ValueError where the budget does not reach for one component a layer, or layers cannot have two."""
    bits, least = config.budget_bits, component_bits(layout)
    if bits is None:
        return
    if bits < least:
        raise ValueError(f"quant.budget_bits={bits:g} is below the {least:g} bits of one component in export.layout={layout}")
    if config.components != 1:
        raise ValueError(
            f"quant.budget_bits chooses between 1 and 2 components; it does not fit quant.components={config.components}"
        )
    if find(config.weight, _MORE, config.component_scales) is None or config.planes > 1:
        raise ValueError(f"quant.budget_bits does not fit quant.weight={config.weight}, which cannot be a sum of {_MORE}")
    config.plain({"components": _MORE})


def spend(
    model: nn.Module,
    layers: Mapping[str, QuantConfig],
    windows: Sequence[Window],
    bits: float,
    layout: str,
    *,
    progress: bool = False,
) -> Budget:
    """Measure every layer's gain, and choose. The model is in full precision and eval mode, and is left as it was.

    Args:
        layers: name -> its configuration as it is now; those of one component may get a second.
        windows: of the text that gains are measured on; time is theirs times twice the layers.
        bits: a weight, over all these layers.

    Raises:
        ValueError: no token is scored, or a logit is not finite.
    """
    meter, modules = Meter(model, windows), dict(model.named_modules(remove_duplicate=False))
    sizes = {name: modules[name].weight.numel() for name in layers}  # type: ignore[union-attr]
    gains = dict(_gains(meter, layers, progress))
    cost = component_bits(layout)
    room = bits * sum(sizes.values()) - cost * sum(sizes[name] * config.planes for name, config in layers.items())
    chosen = choose(gains, {name: cost * sizes[name] for name in gains}, room)
    shares = (
        Share(name, sizes[name], gains.get(name, 0.0), _MORE if name in chosen else config.planes)
        for name, config in layers.items()
    )
    return Budget(bits, layout, meter.tokens, tuple(shares))


def _gains(meter: Meter, layers: Mapping[str, QuantConfig], progress: bool) -> Iterator[tuple[str, float]]:
    some: Iterable[tuple[str, QuantConfig]] = [(name, config) for name, config in layers.items() if config.planes == 1]
    for name, config in shown(some, "gain of a second component", "layers", progress):
        more = replace(config, components=_MORE)
        yield name, meter({name: config}, "weights").kl - meter({name: more}, "weights").kl


def choose(gains: Mapping[str, float], costs: Mapping[str, float], room: float) -> set[str]:
    """Names by gain for a cost, the largest first and at a tie the first, as long as there is room; none that gains nothing."""
    found = set()
    for name in sorted(gains, key=lambda name: -gains[name] / costs[name]):
        if gains[name] > 0 and costs[name] <= room:
            room -= costs[name]
            found.add(name)
    return found
