"""BitLinear while its codes are soft: its value, its gradients, and that it is hard wherever it is not being trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import compiled_and_counted
from torch import Tensor, nn

import qat
from qat import BitLinear, QuantConfig, ops
from qat.conversion.layers import set_beta
from qat.ops import cpu
from qat.ops.soft import planes
from qat.ops.soft.calls import soft_quantize
from qat.quantizers.activations import quantize_activation

BACKWARDS = {"input": 1e-5, "bf16": 2e-2, "int8": 2e-2}


def expected(layer: BitLinear, x: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(what the activations' codes stand for, the soft weight, its slope)."""
    soft, slope = soft_quantize(layer.weight.detach(), torch.tensor(beta), layer.config)
    if layer.config.act_bits is None:
        return x.detach(), soft, slope
    codes, scale = quantize_activation(x.detach(), layer.config.act_granularity, layer.config.eps)
    return codes * scale, soft, slope


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("config", [
    QuantConfig(),
    QuantConfig(granularity="channel", act_granularity="tensor", backward="bf16"),
    QuantConfig(granularity="group", group_size=8, backward="bf16"),
    QuantConfig(weight="binary", backward="int8"),
    QuantConfig(components=2, granularity="channel", backward="bf16"),
    QuantConfig(components=2, component_scales="learned", granularity="group", group_size=4),
    QuantConfig(act_bits=None),
], ids=lambda c: f"{c.weight}-{c.granularity}-{c.components}-{c.backward}")  # fmt: skip
def test_value_and_gradients(config: QuantConfig, kernels: str) -> None:
    config.kernels = kernels
    layer, x, grad = BitLinear(16, 6, config=config), torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 6)
    layer.set_beta(5.0)
    y = layer(x)
    y.backward(grad)
    values, soft, slope = expected(layer, x, 5.0)
    torch.testing.assert_close(y, F.linear(values, soft, layer.bias), rtol=1e-5, atol=1e-5)
    close = {"rtol": BACKWARDS[config.backward], "atol": 3 * BACKWARDS[config.backward]}
    torch.testing.assert_close(x.grad, grad @ soft, **close)
    torch.testing.assert_close(layer.weight.grad, slope * torch.einsum("abn,abk->nk", grad, values), **close)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))


def test_backward_of_the_configuration_is_kept() -> None:
    """bf16 rounds the matmuls of the backward pass, and input does not."""
    torch.manual_seed(1)
    x, grads = torch.randn(64, 32, requires_grad=True), {}
    for backward in ("input", "bf16"):
        layer = BitLinear(32, 16, False, QuantConfig(backward=backward))
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(2))
        layer.set_beta(5.0)
        grads[backward] = torch.autograd.grad(layer(x).sin().sum(), [x, layer.weight])
    for exact, rounded in zip(*grads.values(), strict=True):
        assert 1e-4 < (exact - rounded).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(dtype: torch.dtype) -> None:
    x = torch.randn(4, 16)
    layer = BitLinear(16, 8)
    layer.set_beta(5.0)
    exact = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.abs().sum() > 0
    torch.testing.assert_close(y.float(), exact, rtol=3e-2, atol=3e-2)
    assert layer.to(dtype)(x.to(dtype)).dtype == dtype


def test_it_is_hard_in_eval_mode_and_afterwards() -> None:
    layer, x = BitLinear(16, 8), torch.randn(4, 16)
    hard = layer(x)
    layer.set_beta(4.0)
    assert not torch.equal(layer(x), hard)
    layer.eval()
    assert torch.equal(layer(x), hard)
    layer.train().set_beta(None)
    assert torch.equal(layer(x), hard) and layer.beta is None


def test_lambda_blends_soft_codes_in() -> None:
    layer, x = BitLinear(16, 8, config=QuantConfig(act_bits=None)), torch.randn(4, 16)
    layer.set_beta(4.0)
    layer.set_lambda(0.25)
    y = layer(x)
    y.sum().backward()
    _, soft, slope = expected(layer, x, 4.0)
    weight = layer.weight.detach()
    torch.testing.assert_close(y, F.linear(x, 0.75 * weight + 0.25 * soft, layer.bias))
    torch.testing.assert_close(layer.weight.grad, x.sum(0) * (0.75 + 0.25 * slope))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_beta_outside_of_its_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="above 0 and finite"):
        BitLinear(4, 4).set_beta(value)


def test_the_layers_of_a_model_share_one_tensor() -> None:
    model = nn.Sequential(BitLinear(8, 8), BitLinear(8, 4))
    set_beta(model, 3.0)
    first = model[0].beta
    set_beta(model, 5.0)
    assert model[0].beta is first and model[1].beta is first and first.item() == 5
    set_beta(model, None)
    assert model[0].beta is None and model[1].beta is None


def test_soft_layers_are_not_packed() -> None:
    model = nn.Sequential(BitLinear(8, 8))
    set_beta(model, 3.0)
    with pytest.raises(ValueError, match="0 still trains with soft codes"):
        qat.pack(model)


def test_learned_scales_compile() -> None:
    torch._dynamo.reset()
    layer, x = BitLinear(8, 3, config=QuantConfig(components=2, component_scales="learned")), torch.randn(2, 8)
    layer.set_beta(5.0)
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(f(x).pow(2).sum(), list(layer.parameters())) for f in (traced, layer))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_it_compiles_without_a_break_and_a_new_beta_does_not_recompile(lam: float) -> None:
    layer, x = BitLinear(6, 3), torch.randn(2, 6)
    layer.set_lambda(lam)
    compiled, graphs = compiled_and_counted(layer)
    for beta in (2.0, 5.0, 7.5):
        layer.set_beta(beta)
        assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1
    torch._dynamo.reset()
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    weight = [torch.autograd.grad(f(x).pow(2).sum(), layer.weight)[0] for f in (layer, traced)]
    torch.testing.assert_close(*weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_large_layers_multiply_planes_of_int8(bias: bool, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are kernels for it: as exact as float32 is for a loss, far more than bfloat16."""
    layer = BitLinear(512, 516, bias, QuantConfig(granularity=granularity))
    layer.set_beta(5.0)
    x, grad = torch.randn(3, 40, 512, requires_grad=True), torch.randn(3, 40, 516)
    x.data[0, 0] = 0
    asked: list[bool] = []
    serves = planes.serves
    monkeypatch.setattr(planes, "serves", lambda *given: asked.append(serves(*given)) or asked[-1])
    y = layer(x)
    y.backward(grad)
    assert asked == [ops.backend()["cpu"]["kernels"] == "compiled" and cpu.isa() == "avx512"]
    values, soft, slope = (value.double() for value in expected(layer, x, 5.0))
    exact = F.linear(values, soft, None if layer.bias is None else layer.bias.double())
    assert (y - exact).norm() / exact.norm() < 5e-5
    assert y.shape == exact.shape and y.dtype == torch.float32
    wanted = slope * torch.einsum("abn,abk->nk", grad.double(), values)
    assert (layer.weight.grad - wanted).norm() / wanted.norm() < 1e-6
    with torch.no_grad():
        layer.weight[3, 7] = float("nan")
    assert layer(x)[..., 3].isnan().all()
