"""One walker over a model's modules; convert, pack and unpack swap layers in place and say what they did.

Module swap rather than tensor subclass: latent weights stay ordinary parameters. Whatever multiplies by a matrix and
is not converted appears in `Conversion.skipped` with the reason, or is refused: a layer that silently stays in full
precision is the trap of this field (GPT-2's Conv1D, 3-D expert weights, torch's fused encoder layer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qat.config import QuantConfig
from qat.conversion.overrides import gathered, layer_config, refuse_unmatched
from qat.conversion.probe import Findings, observe
from qat.conversion.record import Conversion
from qat.conversion.selection import Context, Selection, is_linear, other_matrices, patterns, refuse_experts, refuse_quantized
from qat.conversion.swap import as_linear, disable_fused_encoder, swap
from qat.nn import wrapping as wrapping  # listens from here on
from qat.nn.bitlinear import BitLinear
from qat.nn.packed import PackedBitLinear
from qat.quantizers.hadamard import rotate
from qat.quantizers.layouts import get_layout

Listener = Callable[[nn.Module, str], None]
_LISTENERS: list[Listener] = []


def listen(listener: Listener) -> Listener:
    """Have `listener(model, done)` called after every `pack` ("packed") and `unpack` ("unpacked"), when its layers are in place.

    For rooms above this one, which keep a model's own records true to its layers (transformers' quantization config): conversion
    works with torch alone and cannot call them. May be used as a decorator; listeners are called in the order of registration.
    """
    _LISTENERS.append(listener)
    return listener


def announce(model: nn.Module, done: str) -> None:
    """Call the listeners: for whoever puts packed layers in place by other means than `pack`."""
    for listener in _LISTENERS:
        listener(model, done)


def convert(
    model: nn.Module,
    config: QuantConfig | None = None,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    probe: Any = None,
) -> Conversion:
    """Replace the linear layers of `model` by BitLinear, in place.

    Args:
        model: any module; itself a linear layer too. GPT-2's Conv1D counts as one.
        config: how to quantize; default b1.58. Its `overrides` are shell patterns, too.
        include: shell patterns of module names, which stand for everything inside, too. Default: all but output heads,
            tied weights, selectors (routers, gates) and what the probe finds idle. Such a layer is converted when a pattern
            without wildcards names it, unless the conversion would be wrong (another one reads its weight).
        exclude: the same for modules to leave alone; wins over `include`.
        probe: a batch like those that the model will be trained on (a dict of its arguments, a tuple, or a tensor), run once
            forward and backward, to see which layers are called and trained and who reads their weights. Without it the
            record says `not probed`, and towers of another modality than text stay in full precision.

    Raises:
        ValueError: a pattern matches no module, or an override no converted layer; no layer is left to convert; the model is
            already quantized; a weight is not finite; a group size does not fit; expert weights stored as 3-D parameters, which
            no walker could convert (exclude them knowingly); the model cannot run the probe.
    """
    config = config or QuantConfig()
    config.check_norms()
    selection = Selection(patterns(include), patterns(exclude))
    refuse_quantized(model)
    selection.refuse_typos(model)
    refuse_experts(model, selection)
    record = Conversion("bitlinear", config)
    found = _candidates(model, record)
    context = Context.of(model)
    findings = None if probe is None else observe(model, _observable(found, context), probe)
    layers: dict[str, nn.Module] = {}
    transposed: dict[int, nn.Parameter] = {}
    for name, module in found.items():
        reason = _reason(name, module, context, findings, selection)
        if reason is not None:
            record.skipped[name] = reason
            continue
        layers[name] = _convert_layer(name, module, layer_config(config, name), transposed)
        record.converted.append(name)
    _refuse_empty(model, record, "nothing to convert")
    refuse_unmatched(config, record.converted)
    if findings is not None:
        findings.compare_packed(layers)
        record.probe = findings.to_dict()
    swap(model, layers)
    disable_fused_encoder(model)
    return record


def _candidates(model: nn.Module, record: Conversion) -> dict[str, nn.Module]:
    """The linear layers, each once; the record gets a reason for its other names and for matrices that are no layer's."""
    found: dict[str, nn.Module] = {}
    seen: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not is_linear(module):
            record.skipped.update({} if id(module) in seen else other_matrices(name, module))
        elif id(module) in seen:
            record.skipped[name] = f"the same module as {seen[id(module)]}"
        else:
            seen[id(module)] = name
            found[name] = module
    return found


def _observable(found: dict[str, nn.Module], context: Context) -> dict[str, nn.Module]:
    return {name: module for name, module in found.items() if context.firm_reason(name, module) is None}


def _reason(name: str, module: nn.Module, context: Context, findings: Findings | None, selection: Selection) -> str | None:
    """Why a layer is not converted; None where it is."""
    firm = context.firm_reason(name, module) or (findings and findings.firm_reason(name))
    if firm:
        return firm
    if findings is None:
        firm = context.reader_reason(name)
        soft = context.soft_reason(name, module) or context.tower_reason(name)
    else:
        soft = context.soft_reason(name, module) or findings.soft_reason(name) or context.reader_reason(name)
    if firm or (soft and not selection.names_exactly(name)):
        return firm or soft
    return selection.skip_reason(name)


def pack(model: nn.Module, *, layout: str = "2bit") -> Conversion:
    """Replace every BitLinear by PackedBitLinear (`2bit`, `base3` or `sparse`), in place; outputs stay equal to the bit.

    Raises:
        ValueError: no BitLinear; unknown layout; a latent weight that is not finite; lambda still below 1; codes still soft; a
            norm that is still blended in.
    """
    get_layout(layout)

    def build(name: str, layer: nn.Module) -> nn.Module:
        assert isinstance(layer, BitLinear)
        if layer.lam is not None:
            raise ValueError(
                f"{name or 'the model'} still blends quantization in (lambda={layer.lam.item():g}); set_lambda(1) first"
            )
        if layer.beta is not None:
            raise ValueError(
                f"{name or 'the model'} still trains with soft codes (beta={layer.beta.item():g}); set_beta(None) first"
            )
        if layer.rms_norm is not None and layer.rms_norm.blend is not None:
            raise ValueError(
                f"{name or 'the model'} still blends its norm in (blend={layer.rms_norm.blend.item():g}); set_norm_blend(1) first"
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
        weight = layer.dequantize()
        linear.weight = nn.Parameter(rotate(weight) if layer.config.act_hadamard else weight)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach().clone())
        return linear.train(layer.training)

    return _exchange(model, PackedBitLinear, build, "unpacked", None)


def _exchange(
    model: nn.Module, kind: type[nn.Module], build: Callable[[str, nn.Module], nn.Module], done: str, layout: str | None
) -> Conversion:
    old = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if not old:
        raise ValueError(f"{type(model).__name__} has no {kind.__name__} layer to be {done}")
    try:
        config = gathered({name: module.config for name, module in old.items()})  # type: ignore[misc]
    except ValueError as error:
        raise ValueError(f"{error}; have each part {done} on its own") from error
    layers = {name: build(name, module) for name, module in old.items()}
    swap(model, layers)
    announce(model, done)
    return Conversion(done, config, list(layers), {}, layout)


def _convert_layer(name: str, module: nn.Module, config: QuantConfig, transposed: dict[int, nn.Parameter]) -> BitLinear:
    _refuse_nonfinite(name, module.weight)  # type: ignore[arg-type]
    try:
        layer = BitLinear.from_linear(as_linear(module, transposed), config)
    except ValueError as error:
        raise ValueError(f"{name or type(module).__name__}: {error}") from error
    if config.act_hadamard:  # here, and not where layers are made, as loaded weights are rotated
        layer.weight = nn.Parameter(rotate(layer.weight.detach()), layer.weight.requires_grad)
        layer.reset_quantizer()
    if layer.rms_norm is not None and config.rms_norm_start == "blended":
        layer.rms_norm.set_blend(0)  # here, and not where layers are made, as loaded ones have all of their norm
    return layer


def _refuse_nonfinite(name: str, weight: torch.Tensor) -> None:
    if weight.is_meta or not weight.numel():
        return
    if not all(bool(torch.isfinite(end)) for end in weight.aminmax()):  # NaN is both ends; isfinite takes ten times as long
        raise ValueError(f"{name or 'the model'}.weight holds NaN or infinite values")


def _refuse_empty(model: nn.Module, record: Conversion, what: str) -> None:
    if not record.converted:
        raise ValueError(f"{what}: {record.coverage()} in {type(model).__name__}; check include and exclude")
