"""Clipping by the gradients' norm in float64: its value, that shards and orders give the same, and what is not finite."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.config import DistillConfig, OptimConfig
from qat.ops import cpu
from qat.training.gradients import clipping
from qat.training.module import QATModule

SHAPES = [(300, 40), (17,), (64, 9), (1,)]


def parameters(size: float = 1.0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    found = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    for p in found:
        p.grad = (torch.randn(p.shape, generator=generator) * size).to(dtype)
    return [*found, nn.Parameter(torch.zeros(3))]  # the last has no gradient


def gradients(of: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in of if p.grad is not None]


@pytest.fixture(params=["kernels", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(cpu, "square_sum", lambda tensors: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scales_what_is_longer_and_leaves_what_is_not(either: None, dtype: torch.dtype) -> None:
    long, short = parameters(dtype=dtype), parameters(1e-4, dtype)
    before = gradients(parameters(dtype=dtype))
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in before))
    norm = clipping.clip(long, 0.5)
    assert norm is not None and norm.dtype == torch.float64 and norm.item() == pytest.approx(exact, rel=1e-14, abs=0)
    factor = torch.tensor(0.5 / (exact + 1e-6)).item()
    assert all(torch.equal(g, b * factor) for g, b in zip(gradients(long), before, strict=True))
    clipping.clip(short, 0.5)
    assert all(torch.equal(g, b) for g, b in zip(gradients(short), gradients(parameters(1e-4, dtype)), strict=True))
    assert clipping.clip([nn.Parameter(torch.zeros(3))], 1.0) is None


def test_shards_and_other_orders_give_the_same_factor(either: None) -> None:
    """The float32 norm of this many elements differs in its last bits with every cut."""
    for seed in range(20):
        whole = torch.randn(50_000, generator=torch.Generator().manual_seed(seed)) * 1e-3
        factor = (1.0 / clipping.gradient_norm([whole])).float()
        for shards in (2, 3, 8):
            parts = [clipping.gradient_norm([part.clone()]) ** 2 for part in whole.tensor_split(shards)]
            assert torch.equal((1.0 / torch.stack(parts).sum().sqrt()).float(), factor)
        shuffled = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))]
        assert torch.equal((1.0 / clipping.gradient_norm([*shuffled.split(977)])).float(), factor)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_weights(either: None, value: float) -> None:
    bad = parameters()
    bad[0].grad[3, 4] = value  # type: ignore[index]  # it has a gradient
    norm = clipping.clip(bad, 1.0)
    assert norm is not None and not norm.isfinite()
    assert not bad[0].grad.isfinite().all()  # type: ignore[union-attr]


def module(scaler: Any) -> QATModule:
    found = QATModule(nn.Linear(2, 2), DistillConfig(), OptimConfig(), lambda groups: torch.optim.SGD(groups, lr=1.0), 1)
    found._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))  # type: ignore[assignment]
    return found


def test_the_module_clips_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """lightning's own way stays for clipping by value, and for optimizers that unscale gradients by themselves."""
    lightnings = list[Any]()
    monkeypatch.setattr(QATModule, "clip_gradients", lambda self, *arguments: lightnings.append(arguments))
    ours = parameters()
    optimizer = torch.optim.SGD(ours, lr=1.0)
    module(None).configure_gradient_clipping(optimizer, 0.25, "norm")
    assert clipping.gradient_norm(gradients(ours)).item() == pytest.approx(0.25, rel=1e-6) and not lightnings
    module(None).configure_gradient_clipping(optimizer, None, None)
    assert clipping.gradient_norm(gradients(ours)).item() == pytest.approx(0.25, rel=1e-6) and not lightnings
    module(None).configure_gradient_clipping(optimizer, 0.1, "value")
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # as fused ones have it
    module(object()).configure_gradient_clipping(optimizer, 0.1, "norm")
    assert lightnings == [(optimizer, 0.1, "value"), (optimizer, 0.1, "norm")]
