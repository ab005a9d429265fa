"""BitLinear under DistributedDataParallel: two processes on gloo get the mean of their gradients, step after step."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qat

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

RANKS, STEPS = 2, 3


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 8, bias=False))
    qat.convert(model, qat.QuantConfig(granularity="channel"), include=["*"])
    return model


def _input(rank: int, step: int) -> torch.Tensor:
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(10 * step + rank))


def _step(model: nn.Module, *inputs: torch.Tensor) -> None:
    """The mean of the gradients of the inputs' losses, then a change of the weights that no version counter sees."""
    sum(model(x).square().mean() for x in inputs).div(len(inputs)).backward()
    for parameter in model.parameters():
        parameter.data.sub_(0.1 * parameter.grad)
    model.zero_grad()


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    model = DistributedDataParallel(_model())
    for step in range(STEPS):
        _step(model, _input(rank, step))
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that leaves while another still talks ends it by SIGABRT
    dist.destroy_process_group()


def test_ranks_train_as_one(tmp_path: Path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=RANKS)
    alone = _model()
    before = copy.deepcopy(alone.state_dict())
    for step in range(STEPS):
        _step(alone, *(_input(rank, step) for rank in range(RANKS)))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for name, value in alone.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert not torch.equal(value, before[name])
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-5, atol=1e-6)
