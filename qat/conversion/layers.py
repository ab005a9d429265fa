"""Which modules of a model are what: its quantized layers, each once, and counts over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qat.nn.bitlinear import BitLinear
from qat.nn.packed import PackedBitLinear
from qat.ops.options import WeightOptions, weight_options
from qat.ops.shards.serving import unfit


def bitlinears(model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """(name, layer) of every BitLinear, each once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BitLinear))


def unfit_layers(model: nn.Module) -> dict[str, str | None]:
    """name -> why its weight cannot travel between devices as codes, None where it can, of every BitLinear."""
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {name: _unfit(layer, users) for name, layer in bitlinears(model)}


def _unfit(layer: BitLinear, users: Counter[int]) -> str | None:
    if users[id(layer.weight)] > 1:
        return "the weight is another module's, too"
    if layer.weight.dtype != torch.float32:
        return f"the weight is {layer.weight.dtype}"
    return unfit(WeightOptions(*weight_options(layer.config)))


def set_lambda(model: nn.Module, value: float) -> None:
    """Blend quantization in everywhere: 0 is full precision, 1 is fully quantized."""
    for _, layer in bitlinears(model):
        layer.set_lambda(value)


def set_beta(model: nn.Module, value: float | None) -> None:
    """Train with soft codes of that sharpness everywhere; None: with codes. The layers of a device share one tensor."""
    carriers: dict[torch.device, Tensor | None] = {}
    for _, layer in bitlinears(model):
        device = layer.weight.device
        layer.set_beta(value, carriers.get(device))
        carriers[device] = layer.beta


def set_norm_blend(model: nn.Module, value: float) -> None:
    """How much of the norms of layers' own inputs there is everywhere: 0 is none of them, 1 all of them."""
    for _, layer in bitlinears(model):
        if layer.rms_norm is not None:
            layer.rms_norm.set_blend(value)


def packed_layers(model: nn.Module) -> dict[str, PackedBitLinear]:
    """name -> layer of every PackedBitLinear, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedBitLinear)}


def quantized_layers(model: nn.Module) -> dict[str, BitLinear | PackedBitLinear]:
    """name -> layer of every quantized layer, packed or not, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BitLinear | PackedBitLinear)}


def parameter_count(model: nn.Module) -> int:
    """Parameters of the full-precision model, tied ones once."""
    packed = sum(
        layer.in_features * layer.out_features
        + (0 if layer.bias is None else layer.out_features)
        - (0 if layer.rms_norm is None else layer.in_features)  # which the full-precision model has not
        for layer in packed_layers(model).values()
    )
    return packed + sum(parameter.numel() for parameter in model.parameters())


def full_precision_bf16(model: nn.Module) -> int:
    """Bytes of the model in bfloat16, tied parameters once; packed layers count as the linear layers they were."""
    return 2 * parameter_count(model)
