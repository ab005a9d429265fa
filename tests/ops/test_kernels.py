"""The compiled CPU kernels equal the pure-torch reference to the bit, on every path that this CPU has."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from kernel_checks import CONFIGS, DTYPES, EPS, LAYOUTS, codes, configs, same, tokens
from torch import Tensor

import qat
from qat import ops
from qat.config import QuantConfig
from qat.ops import cpu
from qat.ops.options import training_options, weight_options
from qat.quantizers import packing

if not cpu.compiled():
    pytest.skip(f"no compiled kernels: {cpu.status().why}", allow_module_level=True)

# M, N, K: one token, a few, many; N around the panel of 64 rows; K around blocks of 16 and superblocks of 80
SHAPES = [(1, 1, 1), (1, 64, 16), (1, 130, 80), (2, 63, 81), (3, 65, 79), (5, 17, 33), (6, 128, 160), (7, 64, 161), (8, 200, 96)]
SHAPES += [(13, 70, 243), (0, 5, 7), (4, 96, 2000), (200, 66, 320)]


@pytest.fixture(params=cpu.paths(), autouse=True)
def path(request):
    """Every test runs on every instruction set."""
    before = cpu.isa()
    cpu.select_isa(request.param)
    yield request.param
    cpu.select_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def scales(n: int, k: int, granularity: str, groups: int = 1) -> Tensor:
    shape = {"tensor": (1, 1), "channel": (n, 1), "group": (n, groups)}[granularity]
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_linear(shape, layout, dtype, threads):
    m, n, k = shape
    x, packed = tokens(m, k, dtype), ops.pack_ternary(codes(n, k), layout)
    for granularity, bias in (("tensor", None), ("channel", torch.randn(n))):
        arguments = x, packed, scales(n, k, granularity), bias
        options = {"in_features": k, "layout": layout}
        same(ops.packed_linear(*arguments, **options), ops.packed_linear(*arguments, **options, kernels="reference"))


@pytest.mark.parametrize("k,groups", [(96, 3), (320, 2), (320, 4), (90, 6), (128, 1), (33, 11)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 7])
def test_groups(m, k, groups, layout, threads):
    x, packed, scale = tokens(m, k, torch.float32), ops.pack_ternary(codes(70, k), layout), scales(70, k, "group", groups)
    for weight_scale, bias in ((scale, torch.randn(70)), (scale[:1].contiguous(), None)):
        options = {"in_features": k, "layout": layout}
        same(
            ops.packed_linear(x, packed, weight_scale, bias, **options),
            ops.packed_linear(x, packed, weight_scale, bias, **options, kernels="reference"),
        )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_quantize_activation(granularity, dtype, threads):
    for m, k in ((1, 1), (5, 37), (9, 256), (0, 8), (3, 1000)):
        x = tokens(m, k, dtype)
        for a, b in zip(
            ops.quantize_activation(x, granularity), ops.quantize_activation(x, granularity, kernels="reference"), strict=True
        ):
            same(a, b)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dequantize(dtype, threads):
    for n, k, shape in ((3, 1500, (1, 1)), (5, 40, (5, 1)), (4, 60, (4, 3)), (4, 60, (1, 3)), (0, 8, (1, 1)), (1, 1, (1, 1))):
        t, scale = codes(n, k) * 77, torch.rand(shape) + 0.01
        wanted = (t.reshape(n, shape[1], -1) * scale[..., None] if n else t).reshape(n, k).to(dtype)
        same(torch.ops.qat.dequantize(t, scale, dtype), wanted)
        same(torch.ops.qat.dequantize_reference(t, scale, dtype), wanted)
    torch.library.opcheck(torch.ops.qat.dequantize, (codes(6, 20).view(2, 3, 20), torch.rand(2, 3, 1), dtype))


def test_rounding_is_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 3.5] * 5])
    for a, b in zip(ops.quantize_activation(x), ops.quantize_activation(x, kernels="reference"), strict=True):
        same(a, b)


def test_extreme_values():
    limit = torch.finfo(torch.float16).max
    x = torch.tensor([[limit, -limit, 6e-8, 0, 1], [1e-7, 6e-8, 0, 0, 0], [float("nan"), 1, 2, 3, 4]], dtype=torch.float16)
    packed, scale = ops.pack_ternary(codes(9, 5)), scales(9, 5, "channel") * 3
    y, wanted = (ops.packed_linear(x, packed, scale, in_features=5, kernels=kernels) for kernels in ("auto", "reference"))
    same(y[:2], wanted[:2])
    assert y[2].isnan().all() and wanted[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_float(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()].reshape(1, -1)
    for a, b in zip(ops.quantize_activation(x), ops.quantize_activation(x, kernels="reference"), strict=True):
        same(a, b)
    packed = ops.pack_ternary(torch.ones(x.numel(), 1, dtype=torch.int8))
    y = ops.packed_linear(torch.ones(1, 1, dtype=dtype), packed, x.reshape(-1, 1).float(), in_features=1)
    same(
        y.nan_to_num(),
        ops.packed_linear(
            torch.ones(1, 1, dtype=dtype), packed, x.reshape(-1, 1).float(), in_features=1, kernels="reference"
        ).nan_to_num(),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_granularity", ["token", "tensor"])
def test_views_and_shapes(act_granularity, dtype):
    packed, scale = ops.pack_ternary(codes(20, 48)), scales(20, 48, "tensor")
    whole = tokens(24, 96, dtype).reshape(2, 12, 96)
    for x in (whole[..., ::2], whole[..., 48:], whole.transpose(0, 1)[..., :48], whole[0, 0, :48], whole[:0, :, :48]):
        options = {"in_features": 48, "act_granularity": act_granularity}
        same(ops.packed_linear(x, packed, scale, **options), ops.packed_linear(x, packed, scale, **options, kernels="reference"))


def twin(config: QuantConfig, **changes) -> QuantConfig:
    return QuantConfig(**{**vars(config), **changes})


@pytest.mark.parametrize("dtype", DTYPES)
@configs
def test_training_equals_reference(config, dtype, threads):
    weight, bias = torch.randn(40, 72), torch.randn(40)
    same(ops.quantize_weight(weight, config)[0], ops.quantize_weight(weight, twin(config, kernels="reference"))[0])
    results = []
    for kernels in ("auto", "reference"):
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        x = tokens(22, 72, dtype).reshape(2, 11, 72).requires_grad_()
        y = ops.bitlinear(x, w, b, twin(config, kernels=kernels))
        y.backward(torch.ones_like(y) * 0.5)
        results.append((y.detach(), x.grad, w.grad, b.grad))
    for a, b in zip(*results, strict=True):
        same(a, b)


def float64_gradients(x: Tensor, weight: Tensor, grad: Tensor, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """The straight-through gradients in float64, from the codes alone."""
    x_q, x_scale = ops.quantize_activation(x, kernels="reference")
    t, w_scale = ops.quantize_weight(weight, twin(config, kernels="reference"))
    scale = w_scale.double().repeat_interleave(weight.shape[1] // w_scale.shape[1], 1)
    return grad.double() @ (t.double() * scale), grad.double().t() @ (x_q.double() * x_scale.double())


# relative Frobenius errors of grad_x and grad_weight on Gaussian data; int8 rounds each row to 1/127 of its largest
@pytest.mark.parametrize("backward,limit", [("input", 1e-6), ("bf16", 4e-3), ("int8", 1.5e-2)])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_gradients(backward, limit, granularity, threads):
    if backward == "int8" and granularity == "group":
        pytest.skip("refused by QuantConfig")
    config = QuantConfig(granularity=granularity, group_size=32 if granularity == "group" else None, backward=backward)
    torch.manual_seed(0)
    x, weight, grad = (
        torch.randn(150, 128, requires_grad=True),
        torch.randn(96, 128, requires_grad=True),
        torch.randn(150, 96) * 1e-4,
    )
    ops.bitlinear(x, weight, None, config).backward(grad)
    for found, wanted in zip((x.grad, weight.grad), float64_gradients(x.detach(), weight.detach(), grad, config), strict=True):
        error = ((found.double() - wanted).norm() / wanted.norm()).item()
        print(f"backward={backward} {granularity}: relative error {error:.1e}")
        assert error < limit


def test_weight_codes_follow_the_weight():
    layer = qat.BitLinear(48, 32, bias=False, config=QuantConfig(kernels="compiled"))
    x = torch.randn(4, 48)

    def wanted() -> Tensor:
        return ops.bitlinear(x, layer.weight, None, QuantConfig(kernels="reference"))

    for change in (
        lambda: None,
        lambda: layer.weight.mul_(-1),
        lambda: layer.weight.data.add_(0.5),  # the version counter does not see this one
        lambda: layer.weight.data.copy_(torch.randn(32, 48)),
        lambda: setattr(layer, "weight", torch.nn.Parameter(torch.randn(32, 48))),
    ):
        with torch.no_grad():
            change()
        same(layer(x), wanted())


def test_optimizer_steps_and_accumulation():
    losses = []
    for kernels in ("compiled", "reference"):
        torch.manual_seed(0)
        layer = qat.BitLinear(48, 32, config=QuantConfig(kernels=kernels))
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for _ in range(3):
            for part in range(2):
                loss = layer(tokens(6, 48, torch.float32, seed=part)).square().mean()
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[:6] == losses[6:]


def test_packed_tiles_follow_the_buffer():
    x, k = torch.randn(3, 64), 64
    for seed in range(20):  # freed tensors whose memory is used again
        packed, scale = ops.pack_ternary(codes(8, k, seed)), torch.rand(1, 1)
        same(
            ops.packed_linear(x, packed, scale, in_features=k),
            ops.packed_linear(x, packed, scale, in_features=k, kernels="reference"),
        )
        packed.copy_(ops.pack_ternary(codes(8, k, seed + 100)))
        same(
            ops.packed_linear(x, packed, scale, in_features=k),
            ops.packed_linear(x, packed, scale, in_features=k, kernels="reference"),
        )
        del packed, scale
    ops.packed_linear(x, ops.pack_ternary(codes(8, k)), torch.rand(1, 1), in_features=k)
    assert len(cpu._packed_weights.entries) < 10


def test_inference_tensors():
    with torch.inference_mode():
        packed, scale, x = ops.pack_ternary(codes(8, 64)), torch.rand(1, 1), torch.randn(3, 64)
        for _ in range(2):
            same(
                ops.packed_linear(x, packed, scale, in_features=64),
                ops.packed_linear(x, packed, scale, in_features=64, kernels="reference"),
            )
            packed.copy_(ops.pack_ternary(codes(8, 64, 7)))


def test_opcheck():
    weight, x, bias = torch.randn(8, 16, requires_grad=True), torch.randn(3, 16, requires_grad=True), torch.randn(8)
    packed, scale = ops.pack_ternary(codes(8, 16)), torch.rand(1, 1)
    for name in ("bitlinear", "bitlinear_reference"):
        torch.library.opcheck(getattr(torch.ops.qat, name).default, (x, weight, bias, [], *training_options(QuantConfig())))
    for name in ("packed_linear", "packed_linear_reference"):
        torch.library.opcheck(getattr(torch.ops.qat, name).default, (x, packed, scale, bias, 16, "2bit", 8, "token", EPS))
    torch.library.opcheck(torch.ops.qat.quantize_activation.default, (x.detach(), "token", EPS))
    torch.library.opcheck(
        torch.ops.qat.quantize_weight.default, (weight.detach(), [], *weight_options(QuantConfig(granularity="channel")))
    )
    torch.library.opcheck(torch.ops.qat.quantized_matmul.default, (torch.randn(3, 8), codes(8, 16), EPS))


@pytest.mark.parametrize("backward", ["input", "bf16", "int8"])
def test_compile_fullgraph(backward, path):
    if path != cpu.paths()[-1]:
        pytest.skip("compiling does not depend on the instruction set")
    torch._dynamo.reset()
    layer = qat.BitLinear(32, 24, config=QuantConfig(backward=backward))
    packed = qat.PackedBitLinear.from_bitlinear(layer)
    x = torch.randn(5, 32)
    eager, wanted = layer(x), packed(x).detach()
    eager.square().sum().backward()
    gradient = layer.weight.grad.clone()
    layer.weight.grad = None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(layer.weight.grad, gradient)
    with torch.no_grad():
        same(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), wanted)


def test_autocast_and_checkpointing():
    layers = [qat.BitLinear(32, 32, config=QuantConfig(kernels=kernels)) for kernels in ("compiled", "reference")]
    layers[1].load_state_dict(layers[0].state_dict())
    x, outputs = torch.randn(7, 32), []
    for layer in layers:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        y.float().square().sum().backward()
        outputs.append((y.detach(), layer.weight.grad))
    assert outputs[0][0].dtype == torch.bfloat16
    for a, b in zip(*outputs, strict=True):
        same(a, b)


def test_saved_activations_are_a_byte_an_element():
    saved: list[Tensor] = []
    x = torch.randn(512, 64, requires_grad=True)
    layer = qat.BitLinear(64, 64, bias=False, config=QuantConfig(kernels="compiled"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    activations = sum(t.nbytes for t in saved if t.shape[0] == 512)
    assert activations == 512 * (64 + 4) < 0.4 * x.nbytes


def test_prepared_layer_follows_its_buffers() -> None:
    layer = qat.PackedBitLinear.from_bitlinear(qat.BitLinear(48, 32))
    x = torch.randn(2, 48)

    def check() -> None:
        wanted = ops.packed_linear(x, layer.packed, layer.weight_scale, layer.bias, in_features=48, kernels="reference")
        same(layer(x).detach(), wanted.detach())

    with torch.no_grad():
        check()
        layer.packed.copy_(ops.pack_ternary(codes(32, 48)))
        check()
        layer.weight_scale.mul_(2)
        check()
        layer.bias.add_(1)
        check()
        layer.load_state_dict(qat.PackedBitLinear.from_bitlinear(qat.BitLinear(48, 32)).state_dict())
        check()
        copy.deepcopy(layer).packed.copy_(ops.pack_ternary(codes(32, 48, 9)))
        check()
        assert pickle.loads(pickle.dumps(layer))._prepared is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x.requires_grad_()).requires_grad


def test_packed_layer_equals_trained_layer(threads):
    for config in CONFIGS.values():
        layer = qat.BitLinear(72, 40, config=config)
        for layout in LAYOUTS:
            x = tokens(9, 72, torch.float32)
            same(qat.PackedBitLinear.from_bitlinear(layer, layout)(x).detach(), layer(x).detach())


BAD = [
    ({"x": torch.zeros(2, 16, dtype=torch.int32)}, "x must be"),
    ({"x": torch.zeros(2, 17)}, "in_features=16"),
    ({"packed": torch.zeros(8, 5, dtype=torch.uint8)}, "packed must be uint8"),
    ({"packed": torch.zeros(8, 4)}, "packed must be uint8"),
    ({"packed": torch.full((8, 4), 255, dtype=torch.uint8)}, "packed.*holds no ternary codes"),
    ({"scale": torch.ones(7, 1)}, "scale must be float32"),
    ({"scale": torch.ones(8, 3)}, "scale must be float32"),
    ({"scale": torch.ones(8, 1, dtype=torch.float64)}, "scale must be float32"),
    ({"bias": torch.ones(7)}, "bias must be"),
    ({"layout": "3bit"}, "layout"),
    ({"kernels": "fast"}, "kernels='fast'"),
    ({"bias": torch.ones(8, device="meta")}, "bias is on meta"),
    ({"act_granularity": "row"}, "act_granularity='row'"),
    ({"act_bits": 4}, "act_bits=4"),
]


@pytest.mark.parametrize("change,message", BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input(change, message):
    good = {"x": torch.zeros(2, 16), "packed": ops.pack_ternary(codes(8, 16)), "scale": torch.ones(1, 1), "in_features": 16}
    with pytest.raises(ValueError, match=message):
        ops.packed_linear(**{**good, **change})


def test_packing_is_shared_with_the_reference():
    assert packing.decode(ops.pack_ternary(codes(3, 7), "base3"), 7, "base3").equal(codes(3, 7))
