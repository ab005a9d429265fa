"""The compiled CPU kernels equal the pure-torch reference to the bit, on every path that this CPU has."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, EPS, LAYOUTS, codes, same, tokens
from torch import Tensor

from qat import ops
from qat.config import QuantConfig
from qat.ops import cpu
from qat.ops.options import training_options, weight_options
from qat.quantizers import packing

if not cpu.compiled():
    pytest.skip(f"no compiled kernels: {cpu.status().why}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("isa")  # every test runs on every instruction set

# M, N, K: one token, a few, many; N around the panel of 64 rows; K around blocks of 16 and superblocks of 80
SHAPES = [(1, 1, 1), (1, 64, 16), (1, 130, 80), (2, 63, 81), (3, 65, 79), (5, 17, 33), (6, 128, 160), (7, 64, 161), (8, 200, 96)]
SHAPES += [(13, 70, 243), (0, 5, 7), (4, 96, 2000), (200, 66, 320)]


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


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [5, 64, 300])
def test_tokens_with_nan_or_inf_have_codes_of_zero(isa, k, value):
    x, packed = tokens(4, k), ops.pack_ternary(codes(9, k))
    x[2, k // 2] = value
    for granularity in ("token", "tensor"):
        found, wanted = (ops.quantize_activation(x, granularity, kernels=kernels) for kernels in ("auto", "reference"))
        same(found[0], wanted[0])
        assert torch.equal(found[1].nan_to_num(nan=-1.0), wanted[1].nan_to_num(nan=-1.0))
    y = ops.packed_linear(x, packed, scales(9, k, "channel"), in_features=k)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


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
