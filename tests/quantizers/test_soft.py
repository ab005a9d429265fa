"""Soft codes: hard ones where they are sharp, lines where they are not, and their slope is the derivative."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from throwaway import CASES, THROWAWAY
from torch import Tensor

from qat import BitLinear, QuantConfig, ops
from qat.ops.options import weight_options
from qat.ops.soft.calls import soft_quantize
from qat.quantizers import QUANTIZERS
from qat.quantizers.components import sum_components
from qat.quantizers.record import WeightOptions
from qat.quantizers.scales import dequantize_weight
from qat.quantizers.soft import level_gradients, levels_of, soften

CONFIGS = [
    QuantConfig(),
    QuantConfig(scale="absmax"),
    QuantConfig(granularity="channel"),
    QuantConfig(granularity="group", group_size=8),
    QuantConfig(weight="binary"),
    QuantConfig(weight="binary", granularity="group", group_size=8),
    QuantConfig(components=2),
    QuantConfig(components=2, granularity="channel"),
    QuantConfig(components=3, granularity="group", group_size=16),
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.weight}-{c.scale}-{c.granularity}-{c.components}")


def options(config: QuantConfig) -> WeightOptions:
    return WeightOptions(*weight_options(config))


def quantized(w: Tensor, config: QuantConfig) -> Tensor:
    return sum_components(dequantize_weight(*ops.quantize_weight(w, config)), config.planes)


TABLE = [QuantConfig(**case) for case in CASES if case["weight"] in QUANTIZERS]
ANNEALED = [config for config in TABLE if config.quantizer.soft is not None]


@pytest.mark.parametrize(
    "config", [*CONFIGS, *ANNEALED], ids=lambda c: f"{c.weight}-{c.granularity}-{c.components}-{c.component_scales}"
)
def test_sharp_ones_are_codes_off_the_borders(config: QuantConfig) -> None:
    """Of every row of the table that has a soft form."""
    w = torch.randn(12, 96)
    parameters = list(ops.initial_parameters(w, config).values())
    soft, slope = soft_quantize(w, torch.tensor(1e4), config, parameters)
    rows, levels, borders = levels_of(w, parameters, options(config))
    assert (levels.diff(dim=1) >= 0).all() and (borders.diff(dim=1) >= 0).all()
    nearest = (rows[:, :, None] - borders[:, None]).abs().amin(-1) / levels.diff(dim=1).amax(1, keepdim=True)
    clear = (nearest > 5e-3).reshape(w.shape)
    assert clear.float().mean() > 0.8
    torch.testing.assert_close(soft[clear], quantized(w, config)[clear], rtol=0, atol=1e-5)
    assert slope[clear].max() < 1e-3


@every_config
def test_the_slope_is_the_derivative(config: QuantConfig) -> None:
    rows, levels, borders = (value.double() for value in levels_of(torch.randn(12, 32), [], options(config)))
    for beta in (2.0, 11.0):
        rows, step = rows.clone(), 1e-6
        _, slope = soften(rows, levels, borders, beta)
        ahead, behind = (soften(rows + sign * step, levels, borders, beta)[0] for sign in (1, -1))
        torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


def test_values_of_the_ternary_form() -> None:
    w, beta = torch.tensor([[-3.0, -1, 0, 1, 3, 4]]), 2.0  # absmean is 2
    soft, slope = soft_quantize(w, torch.tensor(beta), QuantConfig())
    u = w.double() / 2
    expected = torch.tanh(beta * (u - 0.5) / 2) + torch.tanh(beta * (u + 0.5) / 2)
    torch.testing.assert_close(soft.double(), expected, rtol=1e-6, atol=1e-6)
    cosh = torch.cosh(beta * (u - 0.5) / 2) ** -2 + torch.cosh(beta * (u + 0.5) / 2) ** -2
    torch.testing.assert_close(slope.double(), beta / 4 * cosh, rtol=1e-5, atol=1e-6)
    assert abs(soft[0, 2]) < 1e-7 and abs(slope[0, 2] - 0.7864) < 1e-4


def test_binary_ones_meet_at_the_mean() -> None:
    w = torch.randn(6, 16) + 0.3
    soft, slope = soft_quantize(w, torch.tensor(4.0), QuantConfig(weight="binary"))
    scale = w.abs().mean()
    torch.testing.assert_close(soft, scale * torch.tanh((w - w.mean()) / scale), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, 1 - (soft / scale) ** 2, rtol=1e-5, atol=1e-5)


def test_levels_of_components_are_every_sum_and_meet_half_way() -> None:
    config = QuantConfig(components=2, granularity="channel")
    w = torch.randn(3, 64)
    _, levels, borders = levels_of(w, [], options(config))
    _, scale = ops.quantize_weight(w, config)
    first, second = scale[0].tolist()
    expected = sorted(a * first + b * second for a in (-1, 0, 1) for b in (-1, 0, 1))
    torch.testing.assert_close(levels[0], torch.tensor(expected))
    torch.testing.assert_close(borders, (levels[:, 1:] + levels[:, :-1]) / 2)


@pytest.mark.parametrize("beta", [1e-3, 2.0, 60.0, 1e5])
def test_no_weight_gives_nan(beta: float) -> None:
    w = torch.tensor([[0.0, 1e-30, -1e-12, 0.5, -0.5, 1e30]])
    for config in (QuantConfig(), QuantConfig(weight="binary"), QuantConfig(components=2)):
        for values in (w, torch.zeros_like(w), w.clamp(-1, 1)):
            soft, slope = soft_quantize(values, torch.tensor(beta), config)
            assert soft.isfinite().all() and slope.isfinite().all() and (slope >= 0).all()


def test_levels_that_are_equal_count_once() -> None:
    rows, levels = torch.linspace(-2, 2, 9)[None], torch.tensor([[-1.0, 0, 0, 1]])
    borders = (levels[:, 1:] + levels[:, :-1]) / 2
    plain = soften(rows, levels[:, [0, 1, 3]], borders[:, [0, 2]], 7.0)
    for got, expected in zip(soften(rows, levels, borders, 7.0), plain, strict=True):
        assert torch.equal(got, expected)


def test_empty_weights() -> None:
    soft, slope = soft_quantize(torch.empty(0, 8), torch.tensor(2.0), QuantConfig())
    assert soft.shape == slope.shape == (0, 8)


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_a_learned_scale_has_the_true_gradient(monkeypatch: pytest.MonkeyPatch, lam: float) -> None:
    """By way of the levels and of the borders, unlike that of codes."""
    monkeypatch.setitem(QUANTIZERS, "learned", replace(THROWAWAY["learned"], soft="qat.quantizers.ternary:soft"))
    layer = BitLinear(12, 4, False, QuantConfig(weight="learned", granularity="channel", act_bits=None))
    x, grad = torch.randn(5, 12), torch.randn(5, 4)
    layer.set_beta(3.0)
    layer.set_lambda(lam)
    layer(x).backward(grad)
    scale, w = (value.detach().double().requires_grad_() for value in (layer.step, layer.weight))
    soft = scale / 2 * (torch.tanh(3 * (w.detach() / scale - 0.5) / 2) + torch.tanh(3 * (w.detach() / scale + 0.5) / 2))
    (x.double() @ (lam * soft).T).backward(grad.double())
    torch.testing.assert_close(layer.step.grad.double(), scale.grad, rtol=1e-4, atol=1e-5)
    assert layer.step.grad.abs().min() > 1e-4


@pytest.mark.parametrize("at_once", [1, 2**18])
def test_gradients_of_levels_and_borders(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.quantizers.soft._AT_ONCE", at_once)
    rows, grad = torch.randn(3, 40).double(), torch.randn(3, 40).double()
    levels = torch.randn(3, 9).double().sort(1).values.requires_grad_()
    borders = ((levels[:, 1:] + levels[:, :-1]) / 2).detach().requires_grad_()
    soft, _ = soften(rows, levels, borders, 5.0)
    wanted = torch.autograd.grad(soft, [levels, borders], grad)
    for found, one in zip(level_gradients(grad, rows, levels.detach(), borders.detach(), 5.0), wanted, strict=True):
        torch.testing.assert_close(found, one)


def test_a_learned_scale_below_its_bound_can_rise_again() -> None:
    layer = BitLinear(8, 4, False, QuantConfig(components=2, component_scales="learned", eps=0.1, granularity="channel"))
    layer.set_beta(3.0)
    with torch.no_grad():
        layer.component_scales[:, 1] = 0.01
    layer(torch.randn(5, 8)).sum().backward()
    assert layer.component_scales.grad.abs().min() > 0
