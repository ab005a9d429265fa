"""The menu's rows by value and by gradient, each against its paper's formula written another way."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import same
from torch import Tensor

from qat import BitLinear, PackedBitLinear, QuantConfig, ops
from qat.quantizers import soft
from qat.quantizers.menu import ROWS, steps, stretched, thresholds


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(w: Tensor, weight: str, parameters: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    return ops.quantize_weight(w, QuantConfig(weight=weight, granularity="channel"), parameters)


def test_twn_keeps_what_is_above_its_threshold_at_the_mean_of_that() -> None:
    codes, scale = quantized(torch.tensor([[0.1, -0.2, 0.9, -1.0], [0.5, 0.5, -0.5, 0.5]]), "twn")
    assert codes.tolist() == [[0, 0, 1, -1], [1, 1, -1, 1]]
    torch.testing.assert_close(scale, torch.tensor([[0.95], [0.5]]))


def test_a_fixed_count_is_kept_whatever_the_distribution() -> None:
    w = torch.stack([normal(128), normal(128, seed=1) ** 3])
    codes, scale = quantized(w, "ternary_count")
    assert codes.abs().sum(1).tolist() == [86, 86]
    for row, kept, one in zip(w, codes, scale, strict=True):
        assert row[kept != 0].abs().min() > row[kept == 0].abs().max()
        torch.testing.assert_close(one[0], row.abs().topk(86).values.mean())
    codes, scale = quantized(torch.tensor([[0.5, -0.5, 0.5, -0.5]]), "ternary_count")
    assert codes.tolist() == [[1, -1, 1, -1]] and float(scale) == 0.5


def test_a_learned_threshold_starts_as_twns_and_keeps_something_always() -> None:
    w = normal(6, 64)
    for found, wanted in zip(quantized(w, "ternary_threshold"), quantized(w, "twn"), strict=True):
        same(found, wanted)
    codes, scale = quantized(w, "ternary_threshold", [torch.full((6, 1), 100.0)])
    assert codes.abs().sum(1).tolist() == [1] * 6
    torch.testing.assert_close(scale, w.abs().amax(1, keepdim=True))


def test_the_gradient_of_a_threshold_is_that_of_weights_that_fall_to_zero_there() -> None:
    """mean|w| = 1 and theta = .8: the threshold is .8; the scale is 1.3, so what is .15 to 1.45 large counts, four weights."""
    w, grad, theta = torch.tensor([[0.1, 0.7, -1.4, 1.8, 0.9, -1.1]]), torch.tensor([[3.0, 1.0, 5.0, 7.0, 2.0, -4.0]]), 0.8
    codes = torch.tensor([[0.0, 0.0, -1.0, 1.0, 1.0, -1.0]])
    of_w, named = thresholds.learned_gradient(grad, w, codes, torch.tensor([[1.3]]), torch.tensor([[theta]]))
    assert torch.equal(of_w, grad)
    torch.testing.assert_close(named["threshold"], torch.tensor([[-(1.0 - 5.0 + 2.0 + 4.0) / 6**0.5]]))


def test_sherry_has_one_zero_in_four() -> None:
    codes, scale = quantized(torch.tensor([[0.1, -0.2, 0.9, -1.0, 0.3, 0.3, -0.6, 0.4]]), "sherry")
    assert codes.tolist() == [[0, -1, 1, -1, 0, 1, -1, 1]]
    torch.testing.assert_close(scale, torch.tensor([[(0.2 + 0.9 + 1.0 + 0.3 + 0.6 + 0.4) / 6]]))
    codes, _ = quantized(torch.zeros(1, 4), "sherry")
    assert codes.tolist() == [[0, 1, 1, 1]]


def test_blocks_of_four_that_do_not_fill_a_row_are_refused() -> None:
    for call in (lambda: BitLinear(10, 4, config=QuantConfig(weight="sherry")), lambda: quantized(normal(2, 10), "sherry")):
        with pytest.raises(ValueError, match="in_features=10 is not a multiple of 4, as quant.weight=sherry needs"):
            call()
    with pytest.raises(ValueError, match="quant.group_size=6 does not fit quant.weight=sherry: it must be a multiple of 4"):
        QuantConfig(weight="sherry", granularity="group", group_size=6)


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


GRIDS = [("lsq", -1, 1), ("uniform2", -2, 1), ("uniform3", -4, 3), ("uniform4", -8, 7)]


@pytest.mark.parametrize(("weight", "low", "high"), GRIDS)
def test_learned_steps_are_lsq(weight: str, low: int, high: int) -> None:
    """Codes from `low` to `high`; gradients those of the paper's straight-through graph, the step's divided by sqrt(L high)."""
    layer = a_layer(weight)
    with torch.no_grad():
        layer.step.mul_(0.6)
    w, step = layer.weight.detach().clone().requires_grad_(), (layer.step.detach() * layer.unit).requires_grad_()
    part = (w / step).clamp(low, high)
    wanted = step * straight(part, part.round())
    found = value(layer)
    torch.testing.assert_close(found, wanted)
    levels = (found / step).round().unique()
    assert levels.min() == low and levels.max() == high and len(levels) == high - low + 1
    grad = backward(layer)
    wanted.backward(grad)
    torch.testing.assert_close(layer.weight.grad, w.grad)
    torch.testing.assert_close(layer.step.grad, step.grad * layer.unit / (w.shape[1] * high) ** 0.5)


@pytest.mark.parametrize(("weight", "levels"), [("seq", 3), ("seq2", 4)])
def test_stretched_ranges_are_those_of_paretoq(weight: str, levels: int) -> None:
    layer = a_layer(weight)
    with torch.no_grad():
        layer.clip.mul_(0.7)
    w, clip = layer.weight.detach().clone().requires_grad_(), (layer.clip.detach() * layer.unit).requires_grad_()
    shift = 0.5 if levels == 4 else 0.0
    part = (w / clip).clamp(-0.99, 0.99) * levels / 2 - shift
    wanted = clip * (straight(part, part.round()) + shift) * 2 / levels
    torch.testing.assert_close(value(layer), wanted)
    assert len((wanted / clip)[0].detach().mul(12).round().unique()) == levels
    grad = backward(layer)
    wanted.backward(grad)
    torch.testing.assert_close(layer.weight.grad, w.grad)
    torch.testing.assert_close(layer.clip.grad, clip.grad * layer.unit / w.shape[1] ** 0.5)


def a_layer(weight: str) -> BitLinear:
    layer = BitLinear(512, 4, False, QuantConfig(weight=weight, granularity="channel", act_bits=None))
    with torch.no_grad():
        layer.weight.copy_(normal(4, 512))
        layer.reset_quantizer()
    return layer


def value(layer: BitLinear) -> Tensor:
    return ops.fake_quantize(layer.weight, layer.config, list(layer.quantizer_parameters().values())).detach()


def backward(layer: BitLinear) -> Tensor:
    """Run backward with a gradient of the weight, and give it."""
    grad = normal(4, 512, seed=5)
    layer(torch.eye(512)).backward(grad.t().contiguous())
    return grad


def test_a_grid_is_digits_and_back() -> None:
    for grid, found in ((steps.TWO, (-2, 1)), (steps.THREE, (-4, 3)), (steps.FOUR, (-8, 7))):
        codes = torch.arange(found[0], found[1] + 1.0)[None]
        planes = grid.codes(codes, torch.tensor([grid.ratios]))
        assert planes.abs().max() == 1 and torch.equal(steps.whole(planes, grid.ratios), codes)
    planes = stretched.FOUR.codes(torch.tensor([[-9.0, -0.3, 0.0, 0.3, 0.7]]), torch.tensor([[0.5, 0.25]]))
    assert steps.whole(planes, (2.0, 1.0)).tolist() == [[-3, -1, 1, 1, 3]]


def test_the_clipped_gradient_is_zero_where_the_clip_acts() -> None:
    layer = BitLinear(4, 1, False, QuantConfig(weight="ternary_clipped", act_bits=None))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, -1.4, 0.9, 1.6]]))  # mean 1
    layer(torch.eye(4)).backward(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    assert layer.weight.grad.tolist() == [[1, 2, 3, 0]]


def test_the_annealed_gradient_is_the_soft_codes_slope_and_codes_stay_hard() -> None:
    layer, w = BitLinear(4, 1, False, QuantConfig(weight="ternary_sharpened", act_bits=None)), [[0.1, -1.4, 0.9, 1.6]]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(w))
    grad = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    layer.set_beta(4.0)
    y = layer(torch.eye(4))
    assert y[:, 0].tolist() == [0, -1, 1, 1]
    y.backward(grad)
    _, slope = soft.soften(torch.tensor(w), torch.tensor([[-1.0, 0, 1]]), torch.tensor([[-0.5, 0.5]]), 4.0)
    torch.testing.assert_close(layer.weight.grad, grad.t() * slope)
    layer.set_beta(None)
    layer.weight.grad = None
    layer(torch.eye(4)).backward(grad)
    assert torch.equal(layer.weight.grad, grad.t())  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [name for name, row in ROWS.items() if row.soft is not None])
def test_soft_codes_end_as_the_codes(weight: str) -> None:
    """Where sharp, off the borders; and every parameter has a gradient by way of levels and borders."""
    layer = a_layer(weight)
    layer.set_beta(1e6)
    hard, found = layer.eval()(torch.eye(512)).detach(), layer.train()(torch.eye(512)).detach()
    assert ((found - hard).abs() > 1e-4).float().mean() < 0.005
    layer.set_beta(4.0)
    layer(torch.eye(512)).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in layer.parameters())


def test_tequilas_zeros_add_to_the_bias_and_have_its_gradient() -> None:
    layer = BitLinear(4, 1, False, QuantConfig(weight="tequila", act_bits=None))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.4, -0.2, 1.2, -2.2]]))  # mean 1: codes 0, 0, 1, -1
    x = torch.tensor([[1.0, 2.0, 3.0, 5.0], [0.0, 0.0, 0.0, 1.0]])
    y = layer(x)
    torch.testing.assert_close(y, torch.tensor([[-2 + 0.0002], [-1 + 0.0002]]))
    y.backward(torch.tensor([[1.0], [10.0]]))
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[1 + 0.011, 2 + 0.011, 3, 15]]))
    deployed = PackedBitLinear.from_bitlinear(layer)
    assert deployed.bias is not None and deployed.bias.dtype == torch.float32
    same(deployed(x), y)
    layer.set_lambda(0.5)
    torch.testing.assert_close(layer(x[1:]), torch.tensor([[-1.6 + 0.0001]]))


def test_tequila_adds_to_a_bias_that_is_there() -> None:
    layer, x = BitLinear(64, 6, True, QuantConfig(weight="tequila")), normal(3, 64)
    deployed = PackedBitLinear.from_bitlinear(layer)
    assert torch.all(deployed.bias != layer.bias)
    torch.testing.assert_close(deployed.bias, layer.bias.detach(), rtol=0, atol=0.01)
    same(deployed(x), layer(x))
    layer(x).sum().backward()
    assert layer.bias.grad is not None and layer.bias.grad.tolist() == [3] * 6
