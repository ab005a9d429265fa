"""A model's tensors as a file needs them: tied ones once, contiguous; and what they weigh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, contiguous, each storage once; of tied names the one that is not declared as tied."""
    declared = getattr(model, "_tied_weights_keys", None) or ()
    state = model.state_dict()
    names = sorted(state, key=lambda name: name in declared)  # stable: the order of the state dict otherwise
    kept: dict[Any, str] = {}
    for name in names:
        kept.setdefault(storage_key(state[name], name), name)
    chosen = set(kept.values())
    return {name: _own(tensor) for name, tensor in state.items() if name in chosen}


def storage_key(tensor: Tensor, name: str) -> Any:
    """What two tied tensors have in common. Empty tensors have no address, so their name stands for it."""
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and not a view of a larger storage, which safetensors would refuse."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def byte_count(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the file has each tensor of the model, of its shape, and no other. Tied ones may appear once."""
    state = model.state_dict()
    present = {storage_key(state[name], name) for name in tensors if name in state}
    missing = [name for name, tensor in state.items() if name not in tensors and storage_key(tensor, name) not in present]
    unexpected = [name for name in tensors if name not in state]
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise ValueError(f"{what} tensor {names[0]!r}{more}")
    for name, tensor in tensors.items():
        fixed = name.endswith(("packed", "weight_scale"))
        if tensor.shape != state[name].shape or (fixed and tensor.dtype != state[name].dtype):
            wanted = f"{state[name].dtype} {list(state[name].shape)}"
            raise ValueError(f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, but the model has {wanted}")


def check_finite(model: nn.Module, what: str) -> None:
    """Raise ValueError, saying `what` was read, if a floating-point tensor of the model holds NaN or infinite values."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"{what}: the tensor {name} has NaN or infinite values; the file is damaged")


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: by the extremes, which take no memory, where isfinite takes twice the tensor's."""
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in tensor.aminmax())
