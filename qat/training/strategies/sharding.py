"""FSDP2: a model whose float32 weights lie in parts on the devices of a mesh, gathered block by block where they compute.

What is sharded is a copy without weights of its own: FSDP2 can be taken off no model, nor be copied, while the original goes on
to be measured, packed and exported. That stays on the CPU, gives each device its parts, and gets the trained weights (`collect`).

A gathered parameter is the plain, whole, float32 one, so that codes and scales are those of the whole weight, to the bit. FSDP2's
own cast of parameters to bfloat16 is never used: its codes are not those that are deployed. Nothing stays gathered between a
forward and its backward, the root's parameters neither: so outside of both, weights are always parts.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qat.losses.layers import find_layers
from qat.training.strategies.buffers import gather_once
from qat.training.strategies.shards import divided, whole


def sharded(model: nn.Module, mesh: DeviceMesh, ready: Callable[[nn.Module], object] | None = None) -> nn.Module:
    """A model of the same structure, buffers and names, of whose parameters each device of the 1-D mesh holds its rows.

    `ready` is called with it before its first gather, which settles what travels (`codes.gather_codes`).

    Raises:
        ValueError: a parameter has no rows to divide.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise ValueError(f"trainer.strategy=fsdp2 divides parameters by rows, and {name} has none; use trainer.strategy=ddp")
    shell = without_weights(model)
    for name in units(model):
        fully_shard(shell.get_submodule(name), mesh=mesh, reshard_after_forward=True)
    fully_shard(shell, mesh=mesh, reshard_after_forward=True)
    parts = {id(p): nn.Parameter(divided(p, mesh), p.requires_grad) for p in model.parameters()}
    given = {name: parts[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    shell.load_state_dict(given, strict=False, assign=True)
    if ready is not None:
        ready(shell)
    gather_once(shell)
    return shell.train(model.training)


def without_weights(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters are of the same shapes and dtypes on the meta device; what is tied stays so."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)  # type: ignore[arg-type]


def units(model: nn.Module) -> list[str]:
    """Names of the modules that are gathered at once, from the inside out: the blocks that the model's class names.

    Of a class that has no `_no_split_modules`, the layers that a small run of the model shows; where that shows none, the whole
    model is gathered for each forward and backward. A block that shares a parameter with something outside of it belongs to the
    whole, too.
    """
    kinds, everywhere = set(getattr(model, "_no_split_modules", None) or ()), _owners(model)
    blocks = [module for module in model.modules() if type(module).__name__ in kinds] if kinds else _layers(model)
    alone = [block for block in blocks if all(everywhere[key] == count for key, count in _owners(block).items())]
    names = {module: name for name, module in model.named_modules()}
    return sorted((names[block] for block in alone if block is not model), key=lambda name: -name.count("."))


def _layers(model: nn.Module) -> list[nn.Module]:
    try:
        return find_layers(model).modules
    except Exception:  # it has none that can be told, or its own code does not take the small run
        return []


def _owners(module: nn.Module) -> Counter[int]:
    """Of each parameter, by its id, how many modules within have it as their own."""
    return Counter(id(p) for one in module.modules() for p in one.parameters(recurse=False))


@torch.no_grad()
def collect(shell: nn.Module, model: nn.Module) -> None:
    """Copy the weights and buffers of a sharded model into the one that it was made of, on every device of the mesh."""
    found: dict[int, Tensor] = {}
    target = model.state_dict(keep_vars=True)
    for name, value in shell.state_dict(keep_vars=True).items():
        if id(target[name]) not in found:
            found[id(target[name])] = target[name].copy_(whole(value))


def is_sharded(model: nn.Module) -> bool:
    """Whether `sharded` has made it."""
    return any(isinstance(p, DTensor) for p in model.parameters())
