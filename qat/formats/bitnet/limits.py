"""What the stock transformers folder cannot hold, and why: decided before anything is written, or even trained.

The stock model of the written config is built without memory and compared with ours, layer by layer and shape by shape, so a
surprise (Conv1D, an odd width, a norm inside a padded MLP, a name that stock patterns also match) is a reason, not a broken
folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from qat.config import QuantConfig
from qat.conversion.layers import quantized_layers
from qat.formats.bitnet.tensors import ROWS_A_BYTE, float_tensors
from qat.formats.packed.folder import empty_model, transformers_config
from qat.formats.padding import Padding, plan
from qat.quantizers.record import KINDS

_STOCK_EPS = 1e-5


def unsupported(model: nn.Module) -> str | None:
    """Why the format cannot hold this model (packed, or with BitLinear layers), or None where it can."""
    layers = quantized_layers(model)
    if not layers:
        return f"{type(model).__name__} has no quantized layers"
    for name, layer in layers.items():
        reason = _config_reason(layer.config)
        if reason:
            return f"{name or 'the model'}: {reason}"
    if reason := _norms_reason(layers):
        return reason
    try:
        padding = mlp_padding(model)
        skeleton = stock_skeleton(model, padding)
    except ValueError as error:
        return str(error)
    return _linears_reason(layers, skeleton) or _shape_reason(model, layers, skeleton, padding) or _skip_reason(layers, skeleton)


def _config_reason(quant: QuantConfig) -> str | None:
    if (levels := quant.quantizer.levels) != KINDS["ternary"]:
        return (
            f"quant.weight={quant.weight}, whose codes are {', '.join(map(str, levels))}; the format holds ternary weights only"
        )
    if quant.components > 1:
        return f"quant.components={quant.components}; the format holds one ternary matrix a layer"
    if quant.planes > 1:
        return f"quant.weight={quant.weight}, a sum of {quant.planes} ternary matrices; the format holds one a layer"
    if quant.quantizer.bias is not None:
        return f"quant.weight={quant.weight} gives it a bias, for which the stock model has no room"
    if quant.granularity != "tensor":
        return f"quant.granularity={quant.granularity}; the format has one scale a tensor"
    if quant.act_bits != 8 or quant.act_granularity != "token":
        bits = "null" if quant.act_bits is None else quant.act_bits
        found = f"act_bits={bits}" if quant.act_bits != 8 else f"act_granularity={quant.act_granularity}"
        return f"quant.{found}; the stock reader always quantizes activations to 8 bits per token"
    if quant.act_hadamard:
        return "quant.act_hadamard=True; the stock reader does not rotate inputs"
    if quant.eps != _STOCK_EPS:
        return f"quant.eps={quant.eps}; the stock reader's lower bound of activations is {_STOCK_EPS}"
    return None


def _norms_reason(layers: Mapping[str, Any]) -> str | None:
    first, *others = layers
    eps = layers[first].config.rms_norm_eps
    for name in others:
        found = layers[name].config.rms_norm_eps
        if found != eps:
            return (
                f"{first} has rms_norm_eps={eps} and {name} has {found}; the format norms the inputs of all layers,"
                " with one epsilon, or of none"
            )
    return None


def mlp_padding(model: nn.Module) -> Padding:
    """How the MLPs are widened, so that output rows fill whole bytes."""
    return plan(model, transformers_config(model), ROWS_A_BYTE)


def stock_skeleton(model: nn.Module, padding: Padding) -> nn.Module:
    """What stock AutoModelForCausalLM will build from the config, without memory; ValueError if it is another class."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = padding.raise_config(transformers_config(model))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{type(model).__name__} is no causal language model, and this format is read as one")
    config.architectures = None
    skeleton = empty_model(config, "meta")
    if type(skeleton).__name__ != type(model).__name__:
        raise ValueError(f"AutoModelForCausalLM builds {type(skeleton).__name__} from this config, not {type(model).__name__}")
    return skeleton


def _linears(skeleton: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in skeleton.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)}


def _linears_reason(layers: Mapping[str, nn.Module], skeleton: nn.Module) -> str | None:
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    for name in layers:
        found = modules.get(name)
        if not isinstance(found, nn.Linear):
            what = "missing" if found is None else f"a {type(found).__name__}, which the stock reader never replaces"
            return f"{name or 'the model'} is {what} in stock {type(skeleton).__name__}"
    return None


def _shape_reason(model: nn.Module, layers: Mapping[str, Any], skeleton: nn.Module, padding: Padding) -> str | None:
    """Compare every shape, as it would be written, with what the stock model of the written config has."""
    linears = _linears(skeleton)
    for name, layer in layers.items():
        n = layer.out_features + padding.added * (name in padding.rows)
        k = layer.in_features + padding.added * (name in padding.columns)
        if n % ROWS_A_BYTE:
            why = "no MLP width that could be padded"
            if layer.config.rms_norm_eps is not None:
                why = "padding would change the mean that the norms of the layers' inputs take"
            return f"{name} has out_features={n}, not a multiple of {ROWS_A_BYTE}, and {why}"
        if (n, k) != (linears[name].out_features, linears[name].in_features):
            return f"{name} would be [{n}, {k}], but the stock model of this config has {list(linears[name].weight.shape)}"
    ours = {name: tensor.shape for name, tensor in float_tensors(model, padding, meta=True).items()}
    for name, tensor in skeleton.state_dict().items():
        if name in ours and ours[name] != tensor.shape:
            return f"{name} would be {list(ours[name])}, but the stock model of the written config has {list(tensor.shape)}"
    return None


def _skip_reason(layers: Mapping[str, nn.Module], skeleton: nn.Module) -> str | None:
    """The stock reader matches names as prefix, suffix and regular expression: it must come to exactly our layers."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    keep = [*not_converted(layers, skeleton), *(getattr(skeleton, "_keep_in_fp32_modules", None) or ())]
    stock = {name for name in _linears(skeleton) if should_convert_module(name, keep)}
    wrong = sorted(stock ^ set(layers))
    if wrong:
        what = "replace" if wrong[0] in stock else "leave in full precision"
        return f"the stock reader would {what} {wrong[0]}, and no modules_to_not_convert can tell it otherwise"
    return None


def not_converted(layers: Mapping[str, nn.Module], skeleton: nn.Module) -> list[str]:
    """The linear layers that stay as they are. Never empty, which readers refuse: the embedding stands in."""
    kept = [name for name in _linears(skeleton) if name not in layers]
    return kept or [name for name, module in skeleton.named_modules() if isinstance(module, nn.Embedding)][:1]
