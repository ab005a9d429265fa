"""Damping by its gradient, and the count of oscillations by hand."""

from __future__ import annotations

import pytest
import torch

import qat
from qat.quantizers.components import sum_components
from qat.quantizers.oscillation import MOMENTUM, Trace, damping_gradient
from qat.quantizers.scales import dequantize_weight

ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    "quant",
    [
        {},
        {"granularity": "channel"},
        {"granularity": "group", "group_size": 4},
        {"components": 2, "granularity": "group", "group_size": 4},
        {"weight": "binary"},
    ],
    ids=str,
)
def test_the_gradient_of_the_damping(quant: dict) -> None:
    layer = qat.BitLinear(8, 5, config=qat.QuantConfig(**quant))
    codes, scale = (one.detach() for one in layer.quantized())
    planes = layer.config.planes
    levels = sum_components(dequantize_weight(codes, scale), planes).detach()
    top = sum_components(dequantize_weight(torch.ones_like(codes), scale), planes).detach()
    (levels - torch.maximum(torch.minimum(layer.weight, top), -top)).square().sum().backward()
    found = damping_gradient(layer.weight, codes, scale, planes)
    assert torch.allclose(found, layer.weight.grad) and found.abs().max() > 0
    assert (found == 0).any() == (layer.weight.abs() > top).any()


def test_a_grid_is_not_as_wide_on_both_sides() -> None:
    layer = qat.BitLinear(64, 5, config=qat.QuantConfig(weight="uniform2", granularity="channel"))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5, 64) ** 3)
    layer.reset_quantizer()
    codes, scale = (one.detach() for one in layer.quantized())
    unit = scale[:, -1:]  # levels -2, -1, 0, 1 times it
    levels = (layer.weight / unit).round().clamp(-2, 1).detach() * unit
    (levels - torch.maximum(torch.minimum(layer.weight, unit), -2 * unit)).square().sum().backward()
    assert torch.allclose(damping_gradient(layer.weight, codes, scale, 2), layer.weight.grad, atol=1e-6)
    assert (layer.weight.grad[layer.weight > unit] == 0).all() and (layer.weight > unit).any()


def codes(*values: int) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.int8)


def test_oscillations_are_changes_that_go_back() -> None:
    trace = Trace.begun(codes(0, -1, 0), ONE, 1)
    steps = [(1, 0, 0), (1, 1, 0), (0, 1, 0), (1, 1, 0)]  # the first goes back twice, the second rises, the third rests
    for step in steps[:3]:
        assert not trace.look(codes(*step), ONE, 1, threshold=0.015).any()
    assert trace.frequency[0].tolist() == pytest.approx([MOMENTUM, 0, 0])
    assert trace.look(codes(*steps[3]), ONE, 1, threshold=0.015).tolist() == [[True, False, False]]
    assert trace.frequency[0].tolist() == pytest.approx([MOMENTUM * (1 - MOMENTUM) + MOMENTUM, 0, 0])
    assert trace.direction.tolist() == [[1, 1, 0]]
    mean = 0.0
    for value in (1, 1, 0, 1):
        mean += MOMENTUM * (value - mean)
    assert trace.mean[0, 0].item() == pytest.approx(mean)


def test_a_scale_that_moves_is_no_change_of_codes() -> None:
    trace = Trace.begun(codes(1, -1), ONE, 1)
    for scale in (1.5, 0.5, 1.5, 0.5):
        trace.look(codes(1, -1), ONE * scale, 1, threshold=0.001)
    assert not trace.frequency.any() and not trace.direction.any()


def test_planes_are_one_code() -> None:
    trace = Trace.begun(codes(1, -1), torch.tensor([[1.0, 0.4]]), 2)  # .6
    for step in ((0, 1), (1, -1), (0, 1)):  # .4 and back
        trace.look(codes(*step), torch.tensor([[1.0, 0.4]]), 2, threshold=1.0)
    assert trace.frequency.shape == (1, 1) and trace.frequency.item() == pytest.approx(MOMENTUM * (1 - MOMENTUM) + MOMENTUM)


def test_what_is_frozen_is_held() -> None:
    trace = Trace.begun(codes(1, 0), ONE, 1)
    trace.freeze(torch.tensor([[True, False]]), torch.tensor([[0.75, 9.0]]))
    assert trace.held(torch.tensor([[0.1, 0.2]])).tolist() == [[0.75, pytest.approx(0.2)]]
    assert not trace.look(codes(0, 0), ONE, 1, threshold=0.0)[0, 0] and trace.mean[0, 0] == 0.75
    again = Trace(**trace.state())
    assert all(torch.equal(value, vars(trace)[name]) for name, value in vars(again).items())
