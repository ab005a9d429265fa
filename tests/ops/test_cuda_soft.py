"""Soft codes by the CUDA kernel in the emulation, against their formula and the CPU's kernel; its op and the layer made of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulator import Emulator
from kernel_checks import DTYPES, same
from soft_checks import BETAS, ROWS, check_soft, levels_of, weights
from torch import Tensor

from qat.config import QuantConfig
from qat.ops import cpu, cuda
from qat.ops.options import training_options, weight_options
from qat.ops.soft import kernels, reference

KINDS = ["binary", "ternary", "two components", "equal levels"]


def soften(gpu: Emulator, rows: Tensor, levels: Tensor, borders: Tensor, beta: float, kind: int = 0) -> tuple[Tensor, Tensor]:
    soft, read_soft = gpu.empty(*rows.shape, dtype=DTYPES[kind])
    slope, read_slope = gpu.empty(*rows.shape, dtype=DTYPES[kind])
    operands = gpu.put(rows), *rows.shape, gpu.put(levels), gpu.put(borders), levels.shape[1], gpu.put(torch.tensor(beta))
    gpu.run("run_soften", *operands, kind, soft, slope)
    return read_soft(), read_slope()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(gpu: Emulator, kind: str, beta: float) -> None:
    for i, shape in enumerate(ROWS):
        gpu.order, gpu.at_end = i % 3, i % 2 == 0
        rows = weights(*shape)
        levels, borders = levels_of(kind, rows)
        found = soften(gpu, rows, levels, borders, beta)
        check_soft(found, rows, levels, borders, beta)
        if kind == "two components" and cpu.compiled():  # both go border by border
            for ours, theirs in zip(found, torch.ops.qat.cpu_soften(rows, levels, borders, beta, 0), strict=True):
                same(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 16), (2, 37)])
def test_other_dtypes_are_rounded_once(gpu: Emulator, shape: tuple[int, int]) -> None:
    rows = weights(*shape)
    levels, borders = levels_of("ternary", rows)
    whole = soften(gpu, rows, levels, borders, 9.0)
    for i, dtype in enumerate(DTYPES):
        for part, full in zip(soften(gpu, rows, levels, borders, 9.0, i), whole, strict=True):
            same(part, full.to(dtype))


def test_far_weights(gpu: Emulator) -> None:
    rows = torch.tensor([[10.0, -10.0, 1e30, -1e30, torch.inf, -torch.inf, 0.0, torch.nan]])
    levels, borders = torch.tensor([[-1e-5, 0.0, 1e-5]]), torch.tensor([[-5e-6, 5e-6]])
    soft, slope = soften(gpu, rows, levels, borders, 1e5)
    torch.testing.assert_close(soft[0, :6], torch.tensor([1e-5, -1e-5] * 3), rtol=2e-7, atol=0)
    assert (slope[0, :6] == 0).all() and soft[0, 7].isnan() and not soft[0, :7].isnan().any()


@pytest.fixture
def emulated(emulated_kernels: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from emulator import compiled_ops

    torch.ops.load_library(compiled_ops())
    monkeypatch.setattr(cuda, "_serves", lambda x, k=0: k <= cuda.MAX_WIDTH)


CONFIGS = [QuantConfig(), QuantConfig(weight="binary", granularity="channel"), QuantConfig(granularity="group", group_size=16)]
CONFIGS += [replace(CONFIGS[0], scale_multiplier=1.25), QuantConfig(scale="absmax")]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_layer_equals_the_reference(emulated: None, config: QuantConfig) -> None:
    torch.manual_seed(0)
    x, w, beta = torch.randn(5, 48), torch.randn(20, 48) / 30, torch.tensor(7.0)
    arguments = x, w, None, beta, [], *training_options(config)
    found, wanted = kernels.CUDA["soft_bitlinear"](*arguments), reference.soft_bitlinear(*arguments)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("shape", [(192, 575), (7, 5), (64, 64)])
def test_means_are_the_reference_s(emulated: None, shape: tuple[int, int]) -> None:
    """Which come by way of the kernel for codes, as one row or as many."""
    w = weights(*shape)
    for granularity in ("tensor", "channel"):
        config = QuantConfig(granularity=granularity, scale_multiplier=1.25)
        options = weight_options(config)
        codes, scale = cuda.quantize_weight(w, [], *options)
        for ours, theirs in zip((codes, scale), torch.ops.qat.quantize_weight_reference(w, [], *options), strict=True):
            same(ours, theirs)
