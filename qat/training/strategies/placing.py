"""The models of a training as they are trained: themselves, or, with fsdp2, in parts on the run's devices and back afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from qat import parallel
from qat.config import TrainerConfig
from qat.training.gradients.sums import reduce_in_float64
from qat.training.strategies.codes import gathering
from qat.training.strategies.divisible import divides
from qat.training.strategies.sharding import collect, sharded

Place = Callable[[Any], Any]
"""Of a model what stands for it in a training; of None, None."""


def placing(config: TrainerConfig, device: torch.device) -> Place:
    """The models themselves on one device and with ddp; with fsdp2 one sharded copy of each, as long as somebody uses it."""
    if not divides(config):
        return lambda model: model
    mesh = init_device_mesh(device.type, (parallel.size(),))
    copies: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()

    def place(model: Any) -> Any:
        if model is None:
            return None
        found = copies.get(id(model))
        if found is None:
            found = copies[id(model)] = sharded(model, mesh, gathering(config, mesh))
            if config.gradient_sums == "float64":
                reduce_in_float64(found)
        return found

    return place


def give_back(trained: Any, model: Any) -> None:
    """Let the model have the weights of what was trained in its place."""
    if trained is not model:
        collect(trained, model)
