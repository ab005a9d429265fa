"""lightning's strategy of models that `sharding.sharded` has made: its checkpoints are those of one device.

lightning's own one-file checkpoint of sharded models numbers the optimizer's state in another order than one device does, so that
moments of equal shapes could change places. Here it is put together and taken apart as the optimizer itself has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from qat.training.gradients.split import parts_of
from qat.training.strategies.shards import divided, whole


class FullySharded(ModelParallelStrategy):
    """Each of so many devices has a batch of its own, and a part of the weights, gradients and moments of one model."""

    def __init__(self, devices: int) -> None:
        super().__init__(data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """By `load_optimizer_state_dict`, as on one device."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole, on the CPU of rank 0; empty elsewhere."""
        assert self.lightning_module is not None
        return self._collected(self.lightning_module.state_dict(keep_vars=True))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Likewise, numbered as the optimizer does."""
        return self._collected(getattr(optimizer, "_optimizer", optimizer).state_dict())

    @torch.no_grad()
    def _collected(self, state: dict[str, Any]) -> dict[str, Any]:
        """One tensor after another is whole on every device; what is tied stays one."""
        known: dict[int, Tensor] = {}

        def collect(tensor: Tensor) -> Tensor:
            if id(tensor) not in known:
                full = whole(tensor).detach()
                known[id(tensor)] = full.cpu() if self.is_global_zero else full.new_empty(0)
            return known[id(tensor)]

        found = tree_map_only(Tensor, collect, state)
        return found if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Each process reads for itself, and of the tensors no more than what it takes."""
        return dict(torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each device takes its parts of the weights."""
        assert self.lightning_module is not None
        mine, given = self.lightning_module.state_dict(keep_vars=True), checkpoint["state_dict"]
        taken = {name: _like(value, mine.get(name)) for name, value in given.items()}
        self.lightning_module.load_state_dict(taken, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each device takes its parts of what is kept of each weight."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(_taken(optimizer, state))


def _taken(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    parts = parts_of(optimizer)
    if "parts" in state:
        return {"parts": [_taken(part, one) for part, one in zip(parts, state["parts"], strict=True)]}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = {key: _like_all(of, parameters[key]) for key, of in state["state"].items()}
    return {**state, "state": kept}


def _like_all(state: Any, mine: Any) -> Any:
    return tree_map_only(Tensor, lambda value: _like(value, mine), state)


def _like(value: Tensor, mine: Any) -> Tensor:
    """A whole tensor as one in parts where a parameter of this shape is; else a copy: the file may go."""
    if isinstance(mine, DTensor) and value.shape == mine.shape:
        return divided(value, mine.device_mesh)
    return value.clone()
