"""The torch.library ops: opcheck, gradients against a float64 straight-through reference, and refused arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat import BitLinear, QuantConfig, ops
from qat.ops import cpu
from qat.ops.choice import Status
from qat.ops.options import training_options, weight_options
from qat.quantizers.scales import dequantize_weight

N, K = 6, 20
CONFIGS = {
    "default": QuantConfig(),
    "channel": QuantConfig(granularity="channel", scale="absmax"),
    "group": QuantConfig(granularity="group", group_size=5, scale="absmedian", scale_dtype="bfloat16"),
    "binary": QuantConfig(weight="binary", act_granularity="tensor"),
    "float activations": QuantConfig(act_bits=None),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def packed_arguments(config: QuantConfig, layout: str = "2bit") -> tuple[Tensor, Tensor]:
    t, scale = ops.quantize_weight(torch.randn(N, K), config)
    return ops.pack_ternary(t, layout), scale


def straight_through(value: Tensor, quantized: Tensor) -> Tensor:
    return value + (quantized - value).detach()


def reference(x: Tensor, w: Tensor, bias: Tensor | None, config: QuantConfig) -> Tensor:
    """The textbook layer in float64 and autograd; the quantized values come from the op's own codes."""
    w_q = dequantize_weight(*(part.double() for part in ops.quantize_weight(w.detach().float(), config)))
    x_q = x.detach()
    if config.act_bits:
        codes, scale = ops.quantize_activation(x.detach().float(), config.act_granularity, config.eps)
        x_q = codes.double() * scale.double()
    return F.linear(straight_through(x, x_q), straight_through(w, w_q), bias)


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_opcheck_quantize_activation(granularity: str) -> None:
    torch.library.opcheck(torch.ops.qat.quantize_activation.default, (torch.randn(2, 3, K), granularity, 1e-5))


@configs
def test_opcheck_quantize_weight(config: QuantConfig) -> None:
    torch.library.opcheck(torch.ops.qat.quantize_weight.default, (torch.randn(N, K), [], *weight_options(config)))


@pytest.mark.parametrize("layout", ["2bit", "base3"])
def test_opcheck_pack_and_unpack(layout: str) -> None:
    t = torch.randint(-1, 2, (3, 7), dtype=torch.int8)
    torch.library.opcheck(torch.ops.qat.pack_ternary.default, (t, layout))
    torch.library.opcheck(torch.ops.qat.unpack_ternary.default, (ops.pack_ternary(t, layout), 7, layout))


@configs
def test_opcheck_packed_linear(config: QuantConfig) -> None:
    packed, scale = packed_arguments(config)
    x, bias = torch.randn(3, K, requires_grad=True), torch.randn(N, requires_grad=True)
    rest = (K, "2bit", config.act_bits, config.act_granularity, 1e-5)
    torch.library.opcheck(torch.ops.qat.packed_linear.default, (x, packed, scale, bias, *rest))


@configs
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_bitlinear(config: QuantConfig, bias: bool) -> None:
    x, w = torch.randn(2, 3, K, requires_grad=True), torch.randn(N, K, requires_grad=True)
    b = torch.randn(N, requires_grad=True) if bias else None
    torch.library.opcheck(torch.ops.qat.bitlinear.default, (x, w, b, [], *training_options(config)))


@configs
@pytest.mark.parametrize("shape", [(K,), (4, K), (2, 3, K)], ids=str)
def test_bitlinear_and_its_gradients_equal_the_float64_reference(config: QuantConfig, shape: tuple[int, ...]) -> None:
    inputs = [torch.randn(shape), torch.randn(N, K), torch.randn(N)]
    ours = [value.clone().requires_grad_() for value in inputs]
    theirs = [value.double().requires_grad_() for value in inputs]
    y, expected = ops.bitlinear(*ours, config), reference(*theirs, config)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(expected.shape)
    y.backward(grad)
    expected.backward(grad.double())
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=1e-5, atol=1e-5)


def test_gradients_pass_where_the_codes_are_clipped() -> None:
    w = torch.tensor([[100.0, 0.01, -0.01, 0.0]], requires_grad=True)
    x = torch.tensor([[1.0, 2.0, 3.0, 127.0]])
    ops.bitlinear(x, w).sum().backward()
    torch.testing.assert_close(w.grad, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_keep_the_dtype_of_each_operand(dtype: torch.dtype) -> None:
    x = torch.randn(3, K).to(dtype).requires_grad_()
    w, bias = torch.randn(N, K, requires_grad=True), torch.randn(N, requires_grad=True)
    y = ops.bitlinear(x, w, bias)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, w.grad.dtype, bias.grad.dtype) == (dtype, dtype, torch.float32, torch.float32)
    x32 = x.detach().float().requires_grad_()
    ops.bitlinear(x32, w.detach(), bias.detach()).sum().backward()
    torch.testing.assert_close(x.grad.float(), x32.grad, rtol=2e-2, atol=2e-2)


def test_batch_0_gives_zero_gradients() -> None:
    w, bias = torch.randn(N, K, requires_grad=True), torch.randn(N, requires_grad=True)
    ops.bitlinear(torch.zeros(0, K), w, bias).sum().backward()
    assert not w.grad.any() and not bias.grad.any()


@configs
def test_packed_linear_has_bitlinears_output_and_input_gradient(config: QuantConfig) -> None:
    x, w, bias = torch.randn(3, K, requires_grad=True), torch.randn(N, K), torch.randn(N, requires_grad=True)
    t, scale = ops.quantize_weight(w, config)
    options = {"in_features": K, "act_bits": config.act_bits, "act_granularity": config.act_granularity}
    y = ops.packed_linear(x, ops.pack_ternary(t, "base3"), scale, bias, layout="base3", **options)
    expected = ops.bitlinear(x, w, bias, config)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    for got, wanted in zip(torch.autograd.grad(y, (x, bias), grad), torch.autograd.grad(expected, (x, bias), grad), strict=True):
        assert torch.equal(got, wanted)


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    x, w = torch.randn(3, K, requires_grad=True), torch.randn(N, K, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.bitlinear(x, w).pow(2).sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.pow(2).sum().backward()


@pytest.mark.parametrize("act_bits", [8, None])
def test_autocast_rounds_the_input_and_nothing_else(act_bits: int | None) -> None:
    x, w, config = torch.randn(3, 256), torch.randn(N, 256), QuantConfig(act_bits=act_bits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.bitlinear(x, w, None, config)
    assert y.dtype == torch.bfloat16 and torch.equal(y, ops.bitlinear(x.bfloat16(), w, None, config))


@pytest.mark.parametrize("k", [1 << 17, (1 << 17) + 1], ids=["float32", "float64"])
def test_integer_sums_are_exact_for_any_width(k: int) -> None:
    x = torch.full((1, k), 127.0)
    x[0, -1] = 1.0
    t = ops.pack_ternary(torch.ones(1, k, dtype=torch.int8))
    assert ops.packed_linear(x, t, torch.ones(1, 1), in_features=k).item() == torch.tensor(127.0 * (k - 1) + 1).item()


def test_bias_is_added_after_rescaling() -> None:
    t = ops.pack_ternary(torch.tensor([[1, -1]]))
    y = ops.packed_linear(torch.tensor([[127.0, 1.0]]), t, torch.tensor([[0.5]]), torch.tensor([10.0]), in_features=2)
    assert y.item() == 126 * 0.5 + 10


def test_backend_names_the_kernels_and_the_reason() -> None:
    found = ops.backend()["cpu"]
    assert found["kernels"] in ("reference", "compiled") and found["why"]


def test_compiled_kernels_are_insisted_on_under_compile_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = BitLinear(K, N)
    layer.config.kernels = "compiled"
    monkeypatch.setattr(cpu, "_status", Status("reference", "just so"))
    with pytest.raises(Exception, match="quant.kernels=compiled, but cpu has none: just so"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(2, K))
    torch._dynamo.reset()


X, W, PACKED, SCALE = torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(3, 2, dtype=torch.uint8), torch.ones(1, 1)


def packed(x: Tensor = X, codes: Tensor = PACKED, scale: Tensor = SCALE, bias: Tensor | None = None, **options: object) -> Tensor:
    return ops.packed_linear(x, codes, scale, bias, **{"in_features": 8, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.bitlinear(X.int(), W), "x must be a floating-point tensor"),
        (lambda: ops.bitlinear(torch.tensor(1.0), W), "x must be a floating-point tensor"),
        (lambda: ops.bitlinear(X[:, :7], W), "x has 7 features in its last dimension, but the layer has in_features=8"),
        (lambda: ops.bitlinear(X, W[0]), "weight must be a floating-point matrix"),
        (lambda: ops.bitlinear(X, W.int()), "weight must be a floating-point matrix"),
        (lambda: ops.bitlinear(X, W, torch.zeros(4)), r"bias must be floating point \[3\]"),
        (lambda: ops.bitlinear(X, W, torch.zeros(3, dtype=torch.int32)), r"bias must be floating point \[3\]"),
        (lambda: ops.bitlinear(X, W.to("meta")), "weight is on meta, but x is on cpu"),
        (lambda: ops.bitlinear(X.to("meta"), W), "weight is on cpu, but x is on meta"),
        (lambda: ops.bitlinear(X, W, torch.zeros(3, device="meta")), "bias is on meta, but x is on cpu"),
        (lambda: ops.bitlinear(X, W, None, QuantConfig(granularity="group", group_size=3)), "multiple of quant.group_size=3"),
        (lambda: ops.quantize_weight(W.int()), "weight must be a floating-point matrix"),
        (lambda: ops.quantize_activation(X.int()), "x must be a floating-point tensor"),
        (lambda: ops.quantize_activation(X, "channel"), "granularity='channel' is not allowed; choose token or tensor"),
        (lambda: ops.quantize_activation(X, eps=0.0), "eps=0.0 is not allowed"),
        (lambda: packed(X.int()), "x must be a floating-point tensor"),
        (lambda: packed(X[:, :7]), "x has 7 features"),
        (lambda: packed(codes=PACKED.int()), r"packed must be uint8 \[N, 2\] for in_features=8 in layout 2bit"),
        (lambda: packed(codes=PACKED[:, :1]), r"packed must be uint8 \[N, 2\]"),
        (lambda: packed(layout="base4"), "layout='base4' is not known"),
        (lambda: packed(scale=torch.ones(1)), "scale must be float32"),
        (lambda: packed(scale=torch.ones(2, 1)), r"scale must be float32 \[1 \| 3,"),
        (lambda: packed(scale=torch.ones(3, 3)), r"scale must be float32 \[1 \| 3, 1 \| groups dividing 8\]"),
        (lambda: packed(scale=SCALE.half()), "scale must be float32"),
        (lambda: packed(scale=SCALE.to("meta")), "scale is on meta, but x is on cpu"),
        (lambda: packed(codes=PACKED.to("meta")), "packed is on meta, but x is on cpu"),
        (lambda: packed(bias=torch.zeros(2)), r"bias must be floating point \[3\]"),
        (lambda: packed(act_bits=4), "act_bits=4 is not allowed"),
        (lambda: packed(act_granularity="channel"), "act_granularity='channel' is not allowed"),
        (lambda: packed(eps=-1.0), "eps=-1.0 is not allowed"),
    ],
)
def test_a_bad_argument_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
