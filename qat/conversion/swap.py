"""Put new layers where old ones were: wherever they are referenced, with their hooks, and at the root, too."""

from __future__ import annotations

import torch
from torch import nn

from qat.conversion.selection import is_conv1d
from qat.nn.packed import PackedBitLinear

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


def as_linear(module: nn.Module, transposed: dict[int, nn.Parameter]) -> nn.Linear:
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


def swap(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Put each new layer, with the old one's hooks, wherever the old one is referenced: a shared module stays shared."""
    modules = dict(model.named_modules(remove_duplicate=False))
    new_of = {id(modules[name]): layer for name, layer in layers.items()}
    for name, module in modules.items():
        new = new_of.get(id(module))
        if new is None:
            continue
        for hooks in _HOOKS:
            setattr(new, hooks, getattr(module, hooks))
        if isinstance(new, PackedBitLinear):
            new.name = name
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


def disable_fused_encoder(model: nn.Module) -> None:
    """torch's encoder layer has a fused path in eval mode that reads weights and never calls its linear layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
