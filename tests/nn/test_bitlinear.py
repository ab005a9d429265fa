"""BitLinear and PackedBitLinear: equal to the bit, and faithful to nn.Linear's interface."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import compiled_and_counted
from torch import nn

import qat
from qat import BitLinear, PackedBitLinear, QuantConfig
from qat.quantizers.activations import quantize_activation
from qat.quantizers.scales import dequantize_weight

CONFIGS = [
    QuantConfig(weight=weight, scale=scale, granularity=granularity, group_size=4 if granularity == "group" else None)
    for weight, scale in [("ternary", "absmean"), ("ternary", "absmax"), ("ternary", "absmedian"), ("binary", "absmean")]
    for granularity in ("tensor", "channel", "group")
] + [QuantConfig(act_granularity="tensor"), QuantConfig(act_bits=None), QuantConfig(scale_dtype="float16")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_packed_is_trained(layer: BitLinear, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        for layout in ("2bit", "base3"):
            packed = PackedBitLinear.from_bitlinear(layer, layout)
            for x in inputs:
                y = packed(x)
                assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], layer.out_features)
                assert torch.equal(y, layer(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.weight}-{c.scale}-{c.granularity}-{c.act_bits}")
def test_packed_equals_trained_for_every_config(config: QuantConfig, dtype: torch.dtype) -> None:
    assert_packed_is_trained(BitLinear(24, 7, config=config), torch.randn(5, 24).to(dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("k", "n"), [(341, 5), (1, 1), (5, 3), (4, 1), (341, 342)])
def test_packed_equals_trained_for_odd_shapes(k: int, n: int, bias: bool) -> None:
    inputs = [torch.randn(*lead, k) for lead in [(), (1,), (0,), (3,), (2, 3), (2, 1, 3), (2, 0, 3)]]
    assert_packed_is_trained(BitLinear(k, n, bias), *inputs)


@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(granularity="channel"), QuantConfig(weight="binary")])
def test_packed_equals_trained_for_zero_rows_and_tokens(config: QuantConfig) -> None:
    layer, x = BitLinear(12, 6, config=config), torch.randn(4, 12)
    with torch.no_grad():
        layer.weight[2] = 0
    x[1] = 0
    assert_packed_is_trained(layer, x, torch.zeros(2, 12))
    torch.testing.assert_close(layer(torch.zeros(12)), layer.bias)


def test_packed_equals_trained_for_inputs_that_are_not_contiguous() -> None:
    x = torch.randn(12, 8)
    layer = BitLinear(12, 6)
    assert_packed_is_trained(layer, x.t(), torch.randn(3, 24)[:, ::2], torch.randn(1, 12).expand(4, 12))
    assert torch.equal(layer(x.t()), layer(x.t().contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_equals_trained_for_a_half_precision_model(dtype: torch.dtype) -> None:
    assert_packed_is_trained(BitLinear(32, 6).to(dtype), torch.randn(3, 32).to(dtype))


def test_packed_equals_trained_under_autocast() -> None:
    layer, x = BitLinear(300, 6), torch.randn(3, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, packed = layer(x), PackedBitLinear.from_bitlinear(layer)(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, packed) and torch.equal(y, layer(x.bfloat16()))


def test_forward_is_the_quantized_linear() -> None:
    layer, x = BitLinear(16, 4), torch.randn(3, 16)
    w = layer.weight.double()
    scale = w.abs().mean()
    codes = (x * 127 / x.abs().amax(-1, keepdim=True)).round()
    expected = codes.double() * x.abs().amax(-1, keepdim=True) / 127 @ ((w / scale).round().clamp(-1, 1) * scale).T
    torch.testing.assert_close(layer(x).double(), expected + layer.bias, rtol=1e-5, atol=1e-6)


def test_a_layer_on_meta_infers_shapes() -> None:
    layer = BitLinear(8, 4, device="meta")
    packed = PackedBitLinear(8, 4, True, QuantConfig(), device="meta")
    assert layer(torch.empty(2, 8, device="meta")).shape == packed(torch.empty(2, 8, device="meta")).shape == (2, 4)


@pytest.mark.parametrize(("k", "n"), [(0, 3), (3, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_features_work_as_nn_linear_does(k: int, n: int) -> None:
    assert_packed_is_trained(BitLinear(k, n, config=QuantConfig(granularity="channel")), torch.zeros(2, k))


def test_from_linear_shares_parameters_mode_and_requires_grad() -> None:
    linear = nn.Linear(8, 4).eval()
    linear.weight.requires_grad_(False)
    layer = BitLinear.from_linear(linear)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert not layer.weight.requires_grad and layer.bias.requires_grad


def test_the_layer_keeps_its_own_copy_of_the_config() -> None:
    config = QuantConfig()
    layer = BitLinear(8, 4, config=config)
    config.act_bits = None
    assert layer.config.act_bits == 8


def test_lambda_0_is_nn_linear() -> None:
    linear, x = nn.Linear(8, 4), torch.randn(3, 8)
    layer = BitLinear.from_linear(linear)
    layer.set_lambda(0)
    assert torch.equal(layer(x), linear(x))


def test_lambda_1_is_the_plain_layer() -> None:
    layer, x = BitLinear(8, 4), torch.randn(3, 8)
    plain = layer(x)
    layer.set_lambda(0.5)
    layer.set_lambda(1.0)
    assert torch.equal(layer(x), plain) and layer.lam is None


@pytest.mark.parametrize("act_bits", [8, None])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.999])
def test_lambda_blends_weight_and_input_with_straight_through_gradients(lam: float, act_bits: int | None) -> None:
    config = QuantConfig(act_bits=act_bits)
    layer, x = BitLinear(8, 4, config=config), torch.randn(3, 8, requires_grad=True)
    layer.set_lambda(lam)
    y = layer(x)
    y.backward(torch.ones_like(y))
    codes, scale = quantize_activation(x.detach(), "token", 1e-5)
    mixed_x = x.detach() + lam * (codes * scale - x.detach()) if act_bits else x.detach()
    packed = PackedBitLinear.from_bitlinear(layer)
    mixed_w = layer.weight.detach() + lam * (packed.dequantize() - layer.weight.detach())
    torch.testing.assert_close(y, F.linear(mixed_x, mixed_w, layer.bias))
    torch.testing.assert_close(x.grad, mixed_w.sum(0).expand(3, 8))
    torch.testing.assert_close(layer.weight.grad, mixed_x.sum(0).expand(4, 8))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_lambda_outside_0_to_1_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="it must be in 0 to 1"):
        BitLinear(2, 2).set_lambda(value)


def test_lambda_set_in_inference_mode_can_change_later() -> None:
    layer = BitLinear(4, 2)
    with torch.inference_mode():
        layer.set_lambda(0.25)
    layer.set_lambda(0.5)
    assert layer.lam.item() == 0.5


def test_lambda_works_under_autocast_and_in_bfloat16() -> None:
    layer, x = BitLinear(8, 4), torch.randn(3, 8)
    layer.set_lambda(0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("build", [BitLinear, lambda k, n, config: PackedBitLinear(k, n, True, config)])
def test_a_group_size_that_does_not_divide_is_refused(build: object) -> None:
    with pytest.raises(ValueError, match="in_features=10 is not a multiple of quant.group_size=4"):
        build(10, 4, config=QuantConfig(granularity="group", group_size=4))


def test_dequantize_is_codes_times_scale() -> None:
    packed = PackedBitLinear.from_bitlinear(BitLinear(10, 4, config=QuantConfig(granularity="channel")))
    assert torch.equal(packed.dequantize(), dequantize_weight(packed.codes(), packed.weight_scale))
    assert torch.equal(packed.dequantize(), packed.codes() * packed.weight_scale)


def test_repr_says_how_it_is_quantized() -> None:
    layer = BitLinear(8, 4, config=QuantConfig(granularity="group", group_size=4))
    assert "ternary absmean per group of 4, activations int8 per token" in repr(layer)
    assert "ternary base3, scale [4, 2]" in repr(PackedBitLinear.from_bitlinear(layer, "base3"))


@pytest.mark.parametrize("lam", [1.0, 0.5])
@pytest.mark.parametrize("packed", [False, True])
def test_the_layer_compiles_without_a_graph_break(lam: float, packed: bool) -> None:
    layer, x = BitLinear(12, 5), torch.randn(3, 12, requires_grad=True)
    layer.set_lambda(lam)
    module = PackedBitLinear.from_bitlinear(layer) if packed else layer
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    expected, got = (torch.autograd.grad(f(x).pow(2).sum(), x)[0] for f in (module, compiled))
    torch.testing.assert_close(got, expected)


def test_a_new_lambda_does_not_recompile() -> None:
    layer, x = BitLinear(6, 3), torch.randn(2, 6)
    compiled, graphs = compiled_and_counted(layer)
    for lam in (0.1, 0.2, 0.3):
        layer.set_lambda(lam)
        assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1


NORMED = QuantConfig(rms_norm_eps=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_s_own_norm_comes_before_the_quantization(dtype: torch.dtype) -> None:
    layer, x = BitLinear(24, 7, config=NORMED).to(dtype), 3 * torch.randn(5, 24).to(dtype)
    assert layer.rms_norm is not None and layer.rms_norm.weight.eq(1).all()
    nn.init.normal_(layer.rms_norm.weight, 1, 0.25)
    wide = x.float()
    normed = (wide * (wide.square().mean(-1, keepdim=True) + 0.01).rsqrt()).to(dtype) * layer.rms_norm.weight
    plain = BitLinear(24, 7, dtype=dtype)
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(layer(x), plain(normed)) and not torch.equal(layer(x), plain(x))
    assert_packed_is_trained(layer, x)
    layer(x).float().sum().backward()
    assert layer.rms_norm.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
    layer.set_lambda(0)
    torch.testing.assert_close(layer(x), F.linear(normed, layer.weight, layer.bias))


def test_the_norm_is_transformers_own() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from qat.nn.norm import RMSNorm

    stock, ours, x = LlamaRMSNorm(40, eps=0.01), RMSNorm(40, 0.01), torch.randn(6, 40)
    nn.init.normal_(stock.weight)
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(ours(x), stock(x))
    assert torch.equal(ours.bfloat16()(x.bfloat16()), stock.bfloat16()(x.bfloat16()))


def test_a_layer_from_a_linear_one_gets_a_new_norm_where_and_as_its_weight_is() -> None:
    linear = nn.Linear(8, 3, dtype=torch.bfloat16)
    layer = BitLinear.from_linear(linear, NORMED)
    assert layer.rms_norm is not None and layer.rms_norm.weight.dtype == torch.bfloat16 and not layer.rms_norm.weight.is_meta
    packed = PackedBitLinear.from_bitlinear(layer)
    assert packed.rms_norm is not layer.rms_norm and not any(p.requires_grad for p in packed.parameters())
    assert BitLinear(8, 3).rms_norm is None
    with pytest.raises(ValueError, match="quant.rms_norm_eps=0 is not allowed"):
        QuantConfig(rms_norm_eps=0)


def test_the_input_has_linear_s_name() -> None:
    """Some models call `layer(input=x)`."""
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8)
    qat.convert(model)
    trained = model[0](input=x)
    qat.pack(model)
    assert torch.equal(model[0](input=x), trained)


@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(granularity="channel"), QuantConfig(components=2)], ids=str)
def test_what_inference_mode_has_made_of_a_weight_can_be_trained_with(config: QuantConfig) -> None:
    layer, x = BitLinear(64, 32, config=config), torch.randn(3, 64)
    with torch.inference_mode():
        before = layer(x)
    after = layer(x)
    after.sum().backward()
    assert torch.equal(after, before) and layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
