"""The tensors that FSDP2 gathers a weight into: one set for codes and one for floats, between which a training may change.

FSDP2 makes them at a weight's first gather and fills the same ones at every later one, whatever their size, so a weight that is
to travel otherwise needs others. They hold no memory but while the weight is gathered. There is no public name for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

Buffers = tuple[list[Any], nn.Parameter | None]
"""What arrives of all devices, and the whole parameter that lies in it; None before a first gather."""


class Gathered:
    """A layer's weight as FSDP2 knows it."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter
        self._other: Buffers = [], None

    def change(self) -> None:
        """Gather into the other set from now on. Nothing may be gathered meanwhile."""
        mine = self._parameter
        before: Buffers = mine.all_gather_outputs, getattr(mine, "_unsharded_param", None)
        mine.all_gather_outputs, whole = self._other
        self._other = before
        if whole is not None:
            mine._unsharded_param = whole
        elif before[1] is not None:
            del mine._unsharded_param


def gathered_by_name(shell: nn.Module) -> dict[str, Gathered]:
    """Name of a module -> its parameter `weight`, of all whose weights FSDP2 gathers."""
    names = {id(module): name for name, module in shell.named_modules()}
    infos = ((one, one._module_info) for one in _parameters(shell))
    return {names[id(info.module)]: Gathered(one) for one, info in infos if info.param_name == "weight"}


def _parameters(shell: nn.Module) -> Iterator[Any]:
    for module in shell.modules():
        if isinstance(module, FSDPModule):
            yield from held_by(module)


def held_by(module: FSDPModule) -> Iterator[Any]:
    """FSDP2's records of the parameters that it gathers for this module at once, those of modules within left out."""
    for group in groups_of(module):
        yield from group.fsdp_params


def groups_of(module: FSDPModule) -> list[Any]:
    """Its records of all of them together, one for a module that has some."""
    state: Any = module._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in found if group is not None]


def gather_once(shell: nn.Module) -> None:
    """Make the tensors that are gathered into; made in inference mode, as in a validation, none could train."""
    for module in shell.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()
