"""Scales are one number for everyone: sums in float64, rounded once, whatever the threads, the path, the order or the shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from kernel_checks import DTYPES, same
from torch import Tensor

from qat import QuantConfig, ops
from qat.ops import cpu
from qat.quantizers import binary, scales

if not cpu.compiled():
    pytest.skip(f"no compiled kernels: {cpu.status().why}", allow_module_level=True)

SHAPES = [(1, 1), (3, 5), (2, 4097), (70, 33), (40, 172), (1, 64 * 1536), (5, 20000)]


@pytest.fixture
def any_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weights(*shape: int, seed: int = 0) -> Tensor:
    """Of very different sizes, as rows of a trained matrix are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp() / 30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_is_exact_on_every_path_and_thread_count(isa: str, shape: tuple[int, int], dtype: torch.dtype, any_threads) -> None:
    w = weights(*shape).to(dtype)
    exact = w.double().abs().mean(1, keepdim=True).float(), w.double().mean(1, keepdim=True).float()
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        same(torch.ops.qat.cpu_mean(w, True), exact[0])
        same(torch.ops.qat.cpu_mean(w, False), exact[1])
        same(scales.mean(w.float().abs()), exact[0])
        same(binary.threshold(w.float()), exact[1])


@pytest.mark.parametrize("kernels", ["compiled", "reference"])
@pytest.mark.parametrize("weight", ["ternary", "binary"])
def test_scale_depends_on_neither_order_nor_threads(weight: str, kernels: str, isa: str, any_threads) -> None:
    """In float32 five of ten such matrices have another scale than the exact one."""
    config = QuantConfig(weight=weight, kernels=kernels)
    for seed in range(10):
        w = weights(192, 576, seed=seed)
        wanted = w.double().abs().mean().float().reshape(1, 1)
        order = torch.randperm(w.numel(), generator=torch.Generator().manual_seed(seed))
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            t, scale = ops.quantize_weight(w, config)
            same(scale, wanted)
            same(ops.quantize_weight(w.flatten()[order].reshape(w.shape), config)[1], wanted)
            same(t, ops.quantize_weight(w, QuantConfig(weight=weight, kernels="reference"))[0])


@pytest.mark.parametrize("statistic", ["absmean", "absmax", "absmedian"])
def test_multiplied_scales(statistic: str) -> None:
    w = weights(40, 96)
    for granularity in ("tensor", "channel"):
        config = QuantConfig(scale=statistic, granularity=granularity, scale_multiplier=1.25)
        for ours, theirs in zip(
            ops.quantize_weight(w, config), ops.quantize_weight(w, replace(config, kernels="reference")), strict=True
        ):
            same(ours, theirs)


@pytest.mark.parametrize("shards", [2, 3, 64])
def test_scale_of_shards_summed_apart(shards: int) -> None:
    for seed in range(10):
        w = weights(192, 576, seed=seed)
        total = sum(part.double().abs().sum() for part in w.tensor_split(shards))
        same(ops.quantize_weight(w)[1], (total / w.numel()).float().reshape(1, 1))


def test_square_sum(isa: str, any_threads) -> None:
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        tensors = [weights(n, 37, seed=n).to(DTYPES[n % 3]) for n in (1, 8, 300)]
        wanted = sum(float(x.double().square().sum()) for x in tensors)
        assert cpu.square_sum(tensors) == pytest.approx(wanted, rel=1e-14, abs=0)
    assert cpu.square_sum([weights(6, 6).t()]) is None and cpu.square_sum([weights(2, 2).double()]) is None
    assert cpu.square_sum([weights(0, 4)]) == 0
