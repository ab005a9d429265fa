"""One walker over a model's modules; convert, pack and unpack swap layers in place and say what they did.

Module swap rather than tensor subclass: latent weights stay ordinary parameters. Whatever multiplies by a matrix and
is not converted appears in `Conversion.skipped` with the reason, or is refused: a layer that silently stays in full
precision is the trap of this field (GPT-2's Conv1D, 3-D expert weights, torch's fused encoder layer).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from qat.config import QuantConfig
from qat.conversion.selection import (
    Context,
    Selection,
    is_conv1d,
    is_linear,
    other_matrices,
    patterns,
    refuse_experts,
    refuse_quantized,
)
from qat.nn.bitlinear import BitLinear
from qat.nn.packed import PackedBitLinear
from qat.quantizers.packing import get_layout

VERSION = 1
LISTENERS: list[Callable[[nn.Module, str], None]] = []  # called with every model that was "packed" or "unpacked"
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@dataclass
class Conversion:
    """What a walk changed (`converted`: module names) and what it left alone (`skipped`: name -> reason).

    As JSON it is a map that rebuilds the same layers in a fresh model: `Conversion.from_json(text).apply(model)`.
    """

    kind: str
    config: QuantConfig
    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    layout: str | None = None

    def to_json(self) -> str:
        """The record as a JSON object with its version."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Conversion:
        """The inverse of `to_json`; ValueError for text that is not such a record."""
        try:
            data = json.loads(text)
            version = data.pop("version")
            if version != VERSION:
                raise ValueError(f"version {version} is not known; this qat reads version {VERSION}")
            record = cls(**{**data, "config": QuantConfig(**data["config"])})
            if not all(isinstance(name, str) for name in (*record.converted, *record.skipped, *record.skipped.values())):
                raise ValueError("converted must be a list of names, and skipped must map names to reasons")
            if record.kind not in ("bitlinear", "packed"):
                raise ValueError(f"kind={record.kind!r} is not known; allowed are bitlinear and packed")
            if record.kind == "packed":
                get_layout(str(record.layout))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a conversion record of qat: {error}") from error
        return record

    def apply(self, model: nn.Module) -> None:
        """Put empty layers of this record into a fresh, unconverted `model`, ready for its state dict.

        Raises:
            ValueError: a module that the record names is missing or is not a linear layer.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        fresh: dict[str, nn.Module] = {}
        transposed: dict[int, nn.Parameter] = {}
        for name in self.converted:
            linear = modules.get(name)
            if linear is None or not is_linear(linear):
                found = "missing" if linear is None else f"a {type(linear).__name__}"
                raise ValueError(f"the record converts {name!r}, which is {found} in this {type(model).__name__}")
            fresh[name] = self._build(linear, transposed)
        _swap(model, fresh)
        _disable_fused_encoder(model)

    def _build(self, linear: nn.Module, transposed: dict[int, nn.Parameter]) -> nn.Module:
        plain = _as_linear(linear, transposed)
        if self.kind == "bitlinear":
            return BitLinear.from_linear(plain, self.config)
        bias = plain.bias is not None
        shape, weight = (plain.in_features, plain.out_features), plain.weight
        layer = PackedBitLinear(*shape, bias, self.config, str(self.layout), weight.device, weight.dtype)
        return layer.train(linear.training)

    def summary(self) -> str:
        """One line a person reads: how many layers, and each one skipped with its reason."""
        total = len(self.converted) + len(self.skipped)
        text = f"{len(self.converted)} of {total} linear layers converted"
        if not self.skipped:
            return text
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        parts = [f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} ({why})" for why, names in by_reason.items()]
        return f"{text}; skipped {'; '.join(parts)}"


def convert(
    model: nn.Module,
    config: QuantConfig | None = None,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Conversion:
    """Replace the linear layers of `model` by BitLinear, in place.

    Args:
        model: any module; itself a linear layer too. GPT-2's Conv1D counts as one.
        config: how to quantize; default b1.58.
        include: shell patterns of module names, which stand for everything inside, too. Default: all but output heads,
            tied weights and MoE routers. A head or a router is converted when a pattern without wildcards names it.
        exclude: the same for modules to leave alone; wins over `include`.

    Raises:
        ValueError: a pattern matches no module; no layer is left to convert; the model is already quantized; a weight
            is not finite; a group size does not fit; expert weights stored as one 3-D parameter, which no walker could
            convert (exclude them knowingly).
    """
    config = config or QuantConfig()
    selection = Selection(patterns(include), patterns(exclude))
    refuse_quantized(model)
    selection.refuse_typos(model)
    refuse_experts(model, selection)
    record = Conversion("bitlinear", config)
    layers: dict[str, nn.Module] = {}
    seen: dict[int, str] = {}
    transposed: dict[int, nn.Parameter] = {}
    context = Context.of(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if not is_linear(module):
            record.skipped.update({} if id(module) in seen else other_matrices(name, module))
            continue
        if id(module) in seen:
            record.skipped[name] = f"the same module as {seen[id(module)]}"
            continue
        seen[id(module)] = name
        reason = context.skip_reason(name, module) or selection.skip_reason(name)
        if reason and not selection.names_exactly(name, reason):
            record.skipped[name] = reason
            continue
        layers[name] = _convert_layer(name, module, config, transposed)
        record.converted.append(name)
    _refuse_empty(model, record, "nothing to convert")
    _swap(model, layers)
    _disable_fused_encoder(model)
    return record


def pack(model: nn.Module, *, layout: str = "2bit") -> Conversion:
    """Replace every BitLinear by PackedBitLinear (`2bit` or `base3`), in place; outputs stay equal to the bit.

    Raises:
        ValueError: no BitLinear; unknown layout; a latent weight that is not finite; lambda still below 1.
    """
    get_layout(layout)

    def build(name: str, layer: nn.Module) -> nn.Module:
        assert isinstance(layer, BitLinear)
        if layer.lam is not None:
            raise ValueError(
                f"{name or 'the model'} still blends quantization in (lambda={layer.lam.item():g}); set_lambda(1) first"
            )
        _refuse_nonfinite(name, layer.weight)
        return PackedBitLinear.from_bitlinear(layer, layout)

    return _exchange(model, BitLinear, build, "packed", layout)


def unpack(model: nn.Module) -> Conversion:
    """Replace every PackedBitLinear by nn.Linear with the dequantized weights, in place.

    The activations are no longer quantized, so outputs differ by the int8 rounding of the inputs.

    Raises:
        ValueError: no PackedBitLinear; a byte that holds no codes; a layer that norms its input, which nn.Linear does not.
    """

    def build(name: str, layer: nn.Module) -> nn.Module:
        assert isinstance(layer, PackedBitLinear)
        if layer.rms_norm is not None:
            raise ValueError(f"{name or 'the model'} norms its own input (quant.rms_norm_eps), which no nn.Linear does")
        linear = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
        linear.weight = nn.Parameter(layer.dequantize())
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach().clone())
        return linear.train(layer.training)

    return _exchange(model, PackedBitLinear, build, "unpacked", None)


def bitlinears(model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """(name, layer) of every BitLinear, each once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BitLinear))


def set_lambda(model: nn.Module, value: float) -> None:
    """Blend quantization in everywhere: 0 is full precision, 1 is fully quantized."""
    for _, layer in bitlinears(model):
        layer.set_lambda(value)


def _exchange(
    model: nn.Module, kind: type[nn.Module], build: Callable[[str, nn.Module], nn.Module], done: str, layout: str | None
) -> Conversion:
    old = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if not old:
        raise ValueError(f"{type(model).__name__} has no {kind.__name__} layer to be {done}")
    config: QuantConfig = next(iter(old.values())).config  # type: ignore[assignment]
    for name, module in old.items():
        if module.config != config:
            raise ValueError(f"{name} and {next(iter(old))} have different configs; have each part {done} on its own")
    layers = {name: build(name, module) for name, module in old.items()}
    _swap(model, layers)
    for listener in LISTENERS:
        listener(model, done)
    return Conversion(done, config, list(layers), {}, layout)


def _as_linear(module: nn.Module, transposed: dict[int, nn.Parameter]) -> nn.Linear:
    """The layer itself, or Conv1D's [in, out] weight as a linear's [out, in].

    `transposed` remembers what a parameter became, so that one shared by two layers stays shared.
    """
    if not is_conv1d(module):
        assert isinstance(module, nn.Linear)
        return module
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    k, n = weight.shape
    linear = nn.Linear(k, n, False, device="meta")
    if id(weight) not in transposed:
        transposed[id(weight)] = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    linear.weight = transposed[id(weight)]
    linear.bias = module.bias  # type: ignore[assignment]
    return linear.train(module.training)


def _convert_layer(name: str, module: nn.Module, config: QuantConfig, transposed: dict[int, nn.Parameter]) -> BitLinear:
    _refuse_nonfinite(name, module.weight)  # type: ignore[arg-type]
    try:
        return BitLinear.from_linear(_as_linear(module, transposed), config)
    except ValueError as error:
        raise ValueError(f"{name or type(module).__name__}: {error}") from error


def _refuse_nonfinite(name: str, weight: torch.Tensor) -> None:
    if weight.device.type != "meta" and not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name or 'the model'}.weight holds NaN or infinite values")


def _refuse_empty(model: nn.Module, record: Conversion, what: str) -> None:
    if not record.converted:
        raise ValueError(f"{what}: {record.summary()} in {type(model).__name__}; check include and exclude")


def _swap(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Put each new layer, with the old one's hooks, wherever the old one is referenced: a shared module stays shared."""
    modules = dict(model.named_modules(remove_duplicate=False))
    new_of = {id(modules[name]): layer for name, layer in layers.items()}
    for name, module in modules.items():
        new = new_of.get(id(module))
        if new is None:
            continue
        for hooks in _HOOKS:
            setattr(new, hooks, getattr(module, hooks))
        parent, _, leaf = name.rpartition(".")
        if name:
            setattr(modules[parent], leaf, new)
        else:
            _become(model, new)


def _become(module: nn.Module, new: nn.Module) -> None:
    """Turn the root into `new` in place: there is no parent to hold another object."""
    module.__class__ = new.__class__
    module.__dict__.clear()
    module.__dict__.update(new.__dict__)


def _disable_fused_encoder(model: nn.Module) -> None:
    """torch's encoder layer has a fused path in eval mode that reads weights and never calls its linear layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
