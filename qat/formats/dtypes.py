"""The dtypes in which a model's weights were stored where it was loaded from: what is not trained is written in them again.

Weights are float32 while they are trained, and a bfloat16 source written as float32 would be twice its size. The record is an
attribute of the model, since it must survive `copy.deepcopy`, conversion and packing, which know nothing of it.

A file never changes a number: what was trained is rounded once, in the model, before it is measured for the last time
(`round_floats`), so that the stored values are the measured ones. A tensor that was not rounded is stored in its own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qat.config.checks import choose
from qat.conversion.layers import quantized_layers
from qat.targets import FLOATS

_ATTRIBUTE = "_qat_source_dtypes"


def remember(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Note in which dtype each parameter or buffer, by name, was stored; what is tied to it shares it."""
    state = model.state_dict()
    tied = {state[name].data_ptr(): dtype for name, dtype in dtypes.items() if name in state and state[name].numel()}
    shared = {name: tied[tensor.data_ptr()] for name, tensor in state.items() if tensor.data_ptr() in tied}
    model.__dict__[_ATTRIBUTE] = shared | dict(dtypes)


def source_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """name -> dtype in the source, of every parameter; its own where nobody noted another."""
    noted = model.__dict__.get(_ATTRIBUTE, {})
    return {name: noted.get(name, parameter.dtype) for name, parameter in model.named_parameters(remove_duplicate=False)}


def stored_dtypes(model: nn.Module, floats: str = "source") -> dict[str, torch.dtype]:
    """name -> dtype in which a folder keeps each floating-point tensor of the state dict that is not part of a code.

    Args:
        floats: of `qat.targets.FLOATS`.
    """
    choose("floats", floats, FLOATS)
    noted = model.__dict__.get(_ATTRIBUTE, {})
    layers = quantized_layers(model)
    own = {f"{name}.{key}".lstrip(".") for name, layer in layers.items() for key in layer.state_dict()}
    added = {f"{name}.bias".lstrip(".") for name, layer in layers.items() if layer.config.quantizer.bias is not None}
    plain = {name for name in own if name.rpartition(".")[2] == "bias" or name.endswith("rms_norm.weight")} - added
    return {
        name: noted.get(name, tensor.dtype) if floats == "source" else getattr(torch, floats)
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and (name not in own or name in plain)
    }


@torch.no_grad()
def round_floats(model: nn.Module, floats: str = "source") -> None:
    """Round what is not quantized to the dtype in which it will be stored, in place; latent weights and scales stay.

    What was not trained does not change. Values beyond the dtype's range become its largest.
    """
    state = model.state_dict()
    for name, dtype in stored_dtypes(model, floats).items():
        most = min(torch.finfo(dtype).max, torch.finfo(state[name].dtype).max)
        state[name].copy_(state[name].clamp(-most, most).to(dtype))


def as_stored(model: nn.Module, tensors: Mapping[str, Tensor], floats: str = "source") -> dict[str, Tensor]:
    """Tensors of the model, by their names in its state dict, in the dtypes in which a folder keeps them.

    Raises:
        ValueError: `floats` names a dtype that a tensor was not rounded to.
    """
    dtypes = stored_dtypes(model, floats)
    return {name: _cast(name, tensor, dtypes.get(name, tensor.dtype), floats) for name, tensor in tensors.items()}


def _cast(name: str, tensor: Tensor, dtype: torch.dtype, floats: str) -> Tensor:
    if tensor.dtype == dtype or tensor.is_meta:
        return tensor.to(dtype)
    cast = tensor.to(dtype)
    if torch.equal(cast.to(tensor.dtype), tensor):
        return cast
    if floats != "source":
        raise ValueError(f"{name} holds values that {floats} does not; round them first: qat.formats.dtypes.round_floats")
    return tensor
