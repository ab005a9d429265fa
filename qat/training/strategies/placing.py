"""The models of a training as they are trained: themselves, or, with fsdp2, in parts on the run's devices and back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from qat import parallel
from qat.config import TrainerConfig
from qat.training.strategies.divisible import divides
from qat.training.strategies.sharding import collect, sharded


@contextmanager
def placed(config: TrainerConfig, device: torch.device, model: Any, teacher: Any = None) -> Iterator[tuple[Any, Any]]:
    """The model to train and its teacher, None where there is none; the model given has the trained weights afterwards."""
    if not divides(config):
        yield model, teacher
        return
    mesh = init_device_mesh(device.type, (parallel.size(),))
    parts: nn.Module = sharded(model, mesh)
    yield parts, None if teacher is None else sharded(teacher, mesh)
    collect(parts, model)
