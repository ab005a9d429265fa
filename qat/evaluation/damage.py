"""What quantization costs a model before any training, and where: the damage map.

On windows of tokens, perplexity and KL(p_full precision || p_quantized) of the one full-precision model with

    weights, activations, both    all its layers in that form: are codes or the inputs' rounding to blame?
    families                      the layers of one family alone, q, down, ..., as `qat.conversion.families` names them
    layers                        each layer alone

A layer is quantized in place, for as long as it is measured: its weight becomes what codes and scales stand for, and a hook
rounds its input. There is no second model, and no BitLinear, whose int8 arithmetic gives the same up to the order of sums.
A norm of its own input (quant.rms_norm_eps) is left out, and so is a rotation of it (quant.act_hadamard).
Damages are no parts of a whole: alone, every layer has the clean input of a full-precision model, and what is done to all of
them together is far more than the sum.

The predictions of the full-precision model are kept: four bytes a scored token and entry of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from qat import ops
from qat.config import QuantConfig
from qat.conversion.families import families
from qat.conversion.selection import is_conv1d, is_linear
from qat.metrics.perplexity import Window, logits_of, scored_tokens
from qat.nn.bitlinear import rounded
from qat.terminal.stage import quietly, tracked

T = TypeVar("T")

FORMS = {"weights": (True, False), "activations": (False, True), "both": (True, True)}
"""Form -> whether weights and inputs are quantized."""


@dataclass(frozen=True)
class Damage:
    """Means over the scored tokens, in nats: `nll` of the text, `kl` to full precision."""

    nll: float
    kl: float

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite beyond what a float holds."""
        return math.exp(self.nll) if self.nll < 709 else math.inf


@dataclass(frozen=True)
class DamageMap:
    """The damages of one model on `tokens` scored tokens."""

    tokens: int
    full_precision: Damage
    forms: dict[str, Damage]
    """All layers, with what of them quantized: the keys of `FORMS`."""
    families: dict[str, Damage]
    layers: dict[str, Damage]

    def to_dict(self) -> dict[str, Any]:
        """The map as JSON has it; perplexities are exp(nll)."""
        return asdict(self)

    def table(self) -> Table:
        """What a person reads: forms, then families and layers from the worst."""
        table = Table("quantized")
        for name in ("perplexity", "KL, nats"):
            table.add_column(name, justify="right")
        _row(table, "nothing", self.full_precision)
        for group in (self.forms, _worst_first(self.families), _worst_first(self.layers)):
            table.add_section()
            for name, damage in group.items():
                _row(table, name, damage)
        return table


def _row(table: Table, name: str, damage: Damage) -> None:
    table.add_row(name, f"{damage.perplexity:,.4g}", f"{damage.kl:.4g}")


def _worst_first(group: Mapping[str, Damage]) -> dict[str, Damage]:
    return dict(sorted(group.items(), key=lambda item: -item[1].kl))


class Meter:
    """Measures one full-precision model on windows, with some of its layers quantized."""

    def __init__(self, model: nn.Module, windows: Sequence[Window]) -> None:
        """Run the model once, and keep its predictions. It must be in eval mode; it is left as it is.

        Raises:
            ValueError: no token is scored, or a logit is not finite.
        """
        self.model, self.windows = model, windows
        self.tokens = scored_tokens(windows)
        if not self.tokens:
            raise ValueError("the windows score no token, so there is no damage to be measured")
        self.reference = [torch.log_softmax(scored.float(), -1) for scored in self._scored()]
        self.full_precision = self()

    def __call__(self, layers: Mapping[str, QuantConfig] | None = None, form: str = "both") -> Damage:
        """The damage of these layers, each by its configuration, in a form of `FORMS`.

        Raises:
            ValueError: a logit is not finite.
        """
        nll, kl = 0.0, 0.0
        with quantized(self.model, layers or {}, *FORMS[form]):
            for mine, theirs, targets in zip(self._scored(), self.reference, self._targets(), strict=True):
                logs = torch.log_softmax(mine.float(), -1)
                nll += F.nll_loss(logs.flatten(0, 1), targets.flatten(), reduction="sum").double().item()
                kl += F.kl_div(logs, theirs, reduction="sum", log_target=True).double().item()
        if not math.isfinite(nll + kl):
            raise ValueError(f"the damage of {', '.join(layers or ['nothing'])} is {nll + kl}; the model's logits are not finite")
        return Damage(nll / self.tokens, kl / self.tokens)

    def _scored(self) -> Iterator[Tensor]:
        device = next(self.model.parameters()).device
        return (logits_of(self.model, ids.to(device))[:, start - 1 : -1] for ids, start in self.windows)

    def _targets(self) -> Iterator[Tensor]:
        return (ids[:, start:].to(one.device) for (ids, start), one in zip(self.windows, self.reference, strict=True))


def damage_map(
    model: nn.Module, layers: Mapping[str, QuantConfig], windows: Iterable[Window], *, progress: bool = False
) -> DamageMap:
    """Measure a full-precision model with its layers quantized: all, by family, and each alone (weight and input).

    Args:
        model: in full precision. It is put into eval mode and back, and its weights are as they were.
        layers: name -> how it is quantized; of linear layers, for example `Conversion.config` for each of its `converted`.
        windows: of `metrics.perplexity.windows`; time is theirs times 5 + families + layers.
        progress: show how far it is.

    Raises:
        ValueError: no layer, a name of none, no scored token, or a logit that is not finite.
    """
    if not layers:
        raise ValueError("no layer is given, so there is no damage to be measured")
    was_training = model.training
    model.eval()
    try:
        meter = Meter(model, list(windows))
        forms = {form: meter(layers, form) for form in FORMS}
        grouped = _families(layers)
        by_family = {name: meter(some) for name, some in shown(grouped.items(), "damage of families", "families", progress)}
        alone = {name: meter({name: config}) for name, config in shown(layers.items(), "damage of layers", "layers", progress)}
    finally:
        model.train(was_training)
    return DamageMap(meter.tokens, meter.full_precision, forms, by_family, alone)


def _families(layers: Mapping[str, QuantConfig]) -> dict[str, dict[str, QuantConfig]]:
    """In the order of the model."""
    kinds = families(layers)
    found: dict[str, dict[str, QuantConfig]] = {}
    for name, config in layers.items():
        found.setdefault(kinds[name], {})[name] = config
    return found


def shown(items: Iterable[T], what: str, unit: str, progress: bool) -> Iterator[T]:
    """A loop, and how far it is where that is wanted."""
    with quietly(not progress):
        yield from tracked(list(items), what, unit)


@contextmanager
def quantized(model: nn.Module, layers: Mapping[str, QuantConfig], weights: bool, activations: bool) -> Iterator[None]:
    """While it is open, the named linear layers compute with quantized weights, inputs, or both; afterwards as before.

    A weight shared with another module is quantized for that one, too.

    Raises:
        ValueError: the model has no linear layer of such a name.
    """
    with ExitStack() as undo:
        for name, config in layers.items():
            layer = _linear(model, name)
            if weights:
                undo.callback(_restore, layer.weight, layer.weight.data)
                layer.weight.data = _quantized_weight(layer, config)
            if activations and config.act_bits is not None:
                undo.callback(layer.register_forward_pre_hook(_rounding(config)).remove)
        yield


def _linear(model: nn.Module, name: str) -> Any:
    modules = dict(model.named_modules(remove_duplicate=False))
    layer = modules.get(name)
    if layer is None or not is_linear(layer):
        found = "missing" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(f"{name!r} is {found} in this {type(model).__name__}; damage is that of linear layers")
    return layer


def _restore(weight: nn.Parameter, data: Tensor) -> None:
    weight.data = data


@torch.no_grad()
def _quantized_weight(layer: Any, config: QuantConfig) -> Tensor:
    """What codes and scales stand for, in the shape of the layer's own weight."""
    if is_conv1d(layer):
        return ops.fake_quantize(layer.weight.data.t().contiguous(), config).t()
    return ops.fake_quantize(layer.weight.data, config)


def _rounding(config: QuantConfig) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if config.act_bits == 4:
            return rounded(inputs[0], config), *inputs[1:]
        codes, scale = ops.quantize_activation(inputs[0], config.act_granularity, config.eps, config.kernels)
        return (codes * scale).to(inputs[0].dtype), *inputs[1:]

    return hook
