"""Which of lightning's strategies serves `trainer.strategy`."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from qat.config import TrainerConfig
from qat.training.strategies.environment import by_torchrun
from qat.training.strategies.fsdp2 import FullySharded


def strategy_of(config: TrainerConfig) -> Strategy | str:
    """For one device lightning's own; for several, DistributedDataParallel where nothing else is said."""
    return "auto" if config.devices * config.num_nodes == 1 else STRATEGIES[config.strategy](config)


class AddedInFloat64(DDPStrategy):
    """Of a `QATModule` that is exact: gradients are added up as its `sums` do."""

    def _register_ddp_hooks(self) -> None:
        """lightning's own are for GPUs alone."""
        self.model.register_comm_hook(None, lambda _, bucket: self.lightning_module.sums.over_devices(bucket))  # type: ignore[union-attr,operator]


def _ddp(config: TrainerConfig) -> Strategy:
    """Buffers are not sent from rank 0 before each forward: they are equal, and ranks may validate unequal numbers of batches.

    Parameters that a step does not use, as of an expert that no token went to, are found: each step may have others.
    """
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    more: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    kind = AddedInFloat64 if config.gradient_sums == "float64" else DDPStrategy
    return kind(find_unused_parameters=True, gradient_as_bucket_view=True, **more)


def _fsdp2(config: TrainerConfig) -> Strategy:
    return FullySharded(config.devices * config.num_nodes)


STRATEGIES: dict[str, Any] = {"auto": _ddp, "ddp": _ddp, "fsdp2": _fsdp2}


def environments() -> list[ClusterEnvironment]:
    """What tells lightning of the processes. SLURM's is told not to requeue by itself (see `build_trainer`)."""
    if by_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
        return [TorchElasticEnvironment()]
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def check_devices(config: TrainerConfig, device: torch.device) -> None:
    """Refuse more devices than there are, and a strategy that does not fit their number.

    Raises:
        ValueError: as it says.
    """
    there, what = (torch.cuda.device_count(), "CUDA GPUs") if device.type == "cuda" else (os.cpu_count() or 1, "cores")
    if config.devices > max(there, 1 if device.type == "cuda" else 2):
        raise ValueError(f"trainer.devices={config.devices}, but this machine has {there} {what}; use at most as many")
    if config.strategy == "fsdp2" and config.devices * config.num_nodes == 1:
        raise ValueError("trainer.strategy=fsdp2 shards a model over several devices, and this run has one; use auto")
