"""Soft codes by the compiled CPU kernels, against their formula in float64, on every path: the bound is theirs to keep."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from kernel_checks import DTYPES, same
from soft_checks import BETAS, ROWS, check_soft, levels_of, weights

from qat.config import QuantConfig
from qat.ops import cpu
from qat.ops.soft import cpu as soft_cpu
from qat.ops.soft.calls import soft_bitlinear

if not cpu.compiled():
    pytest.skip(f"no compiled kernels: {cpu.status().why}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["binary", "ternary", "two components", "equal levels"])
def test_equals_the_formula(kind: str, beta: float, threads: int) -> None:
    for shape in ROWS:
        rows = weights(*shape)
        levels, borders = levels_of(kind, rows)
        check_soft(torch.ops.qat.cpu_soften(rows, levels, borders, beta, 0), rows, levels, borders, beta)


@pytest.mark.parametrize("kind", ["binary", "ternary", "two components"])
def test_other_dtypes_are_rounded_once(kind: str) -> None:
    rows = weights(3, 1500)
    levels, borders = levels_of(kind, rows)
    whole = torch.ops.qat.cpu_soften(rows, levels, borders, 9.0, 0)
    for i, dtype in enumerate(DTYPES):
        for part, full in zip(torch.ops.qat.cpu_soften(rows, levels, borders, 9.0, i), whole, strict=True):
            same(part, full.to(dtype))


@pytest.mark.parametrize("kind", ["binary", "ternary", "two components"])
def test_every_path_gives_the_same_bits(kind: str, isa: str) -> None:
    rows = weights(4, 333)
    levels, borders = levels_of(kind, rows)
    found = torch.ops.qat.cpu_soften(rows, levels, borders, 21.0, 0)
    cpu.select_isa("portable")
    for ours, portable in zip(found, torch.ops.qat.cpu_soften(rows, levels, borders, 21.0, 0), strict=True):
        same(ours, portable)


@pytest.mark.parametrize("beta", [2.0, 60.0, 1e5])
def test_far_weights_have_their_level_and_no_slope(beta: float) -> None:
    """Scales may be as small as eps, weights then a million of them; what is not a number stays so, and alone."""
    rows = torch.tensor([[10.0, -10.0, 1e30, -1e30, math.inf, -math.inf, 0.0, math.nan] * 3])
    for s in (1e-5, 0.02):
        levels, borders = torch.tensor([[-s, 0.0, s]]), torch.tensor([[-s / 2, s / 2]])
        same(torch.ops.qat.cpu_soften(rows, levels, borders, beta, 0)[0][:, :6], torch.tensor([[s, -s] * 3]))
        for level in (levels, levels * torch.tensor([1.0, 1.0, 1.0000001])):  # the kernel of ternary levels, that of any
            soft, slope = torch.ops.qat.cpu_soften(rows, level, borders, beta, 0)
            torch.testing.assert_close(soft[0, :6], torch.tensor([s, -s] * 3), rtol=2e-7, atol=0)
            assert (slope[0, :6] == 0).all() and soft[0, 6].abs() < 1e-7 * s
            assert soft[0, 7].isnan() and not soft[0, 8:15].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_activations(dtype: torch.dtype, threads: int) -> None:
    for shape in ((1, 1), (7, 33), (2, 5, 256), (0, 8), (3, 1000)):
        x = (torch.randn(shape) * 3).to(dtype)
        if x.numel() > 8:
            x.view(-1, shape[-1])[-1] = 0
        for granularity in ("token", "tensor"):
            codes, scale = torch.ops.qat.quantize_activation_reference(x, granularity, 1e-5)
            wanted = torch.ops.qat.dequantize_reference(codes, scale, dtype), codes, scale
            for found, one in zip(soft_cpu.rounded(x, granularity, 1e-5), wanted, strict=True):
                same(found, one)
    views = torch.randn(6, 80).to(dtype)
    for x in (views[:, ::2], views.t()):
        same(soft_cpu.rounded(x, "token", 1e-5)[0], soft_cpu.rounded(x.contiguous(), "token", 1e-5)[0])


CONFIGS = [QuantConfig(), QuantConfig(weight="binary", granularity="channel"), QuantConfig(granularity="group", group_size=16)]
CONFIGS += [QuantConfig(granularity="channel", components=2), QuantConfig(act_granularity="tensor"), QuantConfig(act_bits=None)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_equals_the_reference(config: QuantConfig, dtype: torch.dtype) -> None:
    """Forward and gradients, from float32 weights."""
    torch.manual_seed(0)
    x, w, grad = torch.randn(5, 48).to(dtype), torch.randn(20, 48) / 30, torch.randn(5, 20).to(dtype)
    found = []
    for kernels in ("auto", "reference"):
        operands = [value.clone().requires_grad_() for value in (x, w)]
        y = soft_bitlinear(*operands, None, torch.tensor(7.0), replace(config, kernels=kernels))
        y.backward(grad)
        found.append([y.detach(), *[value.grad for value in operands]])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())
