"""What only a GPU can show of the CUDA ops: large shapes, streams, graphs, compilation, gradients, messages."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from device_shapes import ACTIVATIONS, DECODE, INTEGERS, PREFILL, TRAINING, WEIGHTS
from kernel_checks import DTYPES, EPS, LAYOUTS, check_packed_linear, check_weight_codes, codes, on_the_gpu, same, tokens, unkept
from torch import Tensor

import qat
from qat import ops
from qat.config import QuantConfig
from qat.ops import reference
from qat.ops.options import training_options, weight_options
from qat.quantizers import activations, packing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DECODE + PREFILL, ids=str)
def test_packed_linear_large(shape, dtype):
    m, n, k, groups = shape
    place = torch.device("cuda"), on_the_gpu
    packed, scale = packing.pack_ternary(codes(n, k), "2bit"), torch.rand(n, groups) + 0.01
    check_packed_linear(place, tokens(m, k, dtype), packed, scale, torch.randn(n), k, "2bit", "token")


@pytest.mark.parametrize("shape", TRAINING, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bitlinear_large(shape, dtype):
    m, n, k, groups = shape
    config = QuantConfig() if groups == 1 else QuantConfig(granularity="group", group_size=k // groups)
    x, w = tokens(m, k, dtype), torch.randn(n, k) * 0.02
    y, x_q, _, bits, scale = (v.cpu() for v in torch.ops.qat.bitlinear(x.cuda(), w.cuda(), None, [], *training_options(config)))
    t = unkept(bits, w, config)
    check_weight_codes(w, t, scale, config)
    wanted, divisor = activations.activation_codes(x, "token", EPS)
    same(x_q, wanted)
    same(y, reference.integer_linear(x_q, divisor, t, scale, None, x.dtype))


@pytest.mark.parametrize("shape", INTEGERS, ids=str)
def test_integers_large(shape):
    a, b = (torch.randint(-128, 128, size, dtype=torch.int8) for size in (shape[::2], shape[:0:-1]))
    same(torch.ops.qat.int8_matmul(a.cuda(), b.cuda()), (a.double() @ b.double()).int())


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers_large(dtype):
    for m, k in ACTIVATIONS:
        x = tokens(m, k, dtype)
        found, wanted = (ops.quantize_activation(one, "token") for one in (x.cuda(), x))
        for a, b in zip(found, wanted, strict=True):
            same(a, b)
    for granularity, n, k, size in WEIGHTS:
        config, w = QuantConfig(granularity=granularity, group_size=size), (torch.randn(n, k) * 0.02).to(dtype)
        check_weight_codes(w, *(part.cpu() for part in ops.quantize_weight(w.cuda(), config)), config)


@pytest.mark.parametrize("width", [256, 2560])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("captured", [False, True])
def test_programmatic_launches_as_a_chain(width, groups, captured):
    """Layers for one token, each launched before the one ahead has ended: as if each had waited."""
    layers = [(codes(width, width, seed), torch.rand(width, groups) / width**0.5 + 1e-3) for seed in range(8)]
    layers = [(packing.pack_ternary(t, "2bit").cuda(), scale.cuda()) for t, scale in layers]
    x, run = torch.zeros(1, width, device="cuda"), torch.ops.qat.cuda_packed_linear

    def chain(overlap: bool) -> Tensor:
        y = x
        for packed, scale in layers:
            y = run(y, packed, scale, None, width, False, EPS, overlap)
        return y

    call = partial(chain, True)
    if captured:
        chain(True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = chain(True)

        def call() -> Tensor:
            graph.replay()
            return kept.clone()

    found, wanted = [], []
    for seed in range(200):
        x.copy_(tokens(4, width, seed=seed)[3:])
        found.append(call())
    for seed in range(200):
        x.copy_(tokens(4, width, seed=seed)[3:])
        wanted.append(chain(False))
        torch.cuda.synchronize()
    same(torch.cat(found), torch.cat(wanted))
    assert torch.cat(wanted).abs().amax(-1).min() > 0


def test_the_kernels_are_compiled_and_kernels_compiled_is_honoured():
    found = ops.backend()["cuda"]
    assert found["kernels"] == "compiled", found["why"]
    layer = qat.BitLinear(64, 32, config=QuantConfig(kernels="compiled")).cuda()
    packed = qat.PackedBitLinear.from_bitlinear(layer)
    x = torch.randn(3, 64, device="cuda")
    with torch.no_grad():
        same(packed(x), layer(x))


@pytest.mark.parametrize("backward,limit", [("input", 1e-6), ("bf16", 4e-3), ("int8", 1.5e-2)])
@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(granularity="channel")], ids=["tensor", "channel"])
def test_gradients(backward, limit, config):
    torch.backends.cuda.matmul.allow_tf32 = False
    config = QuantConfig(**{**vars(config), "backward": backward})
    x, w, grad = torch.randn(150, 128), torch.randn(96, 128), torch.randn(150, 96) * 1e-4
    ours = [value.cuda().requires_grad_() for value in (x, w)]
    ops.bitlinear(*ours, None, config).backward(grad.cuda())
    x_q, x_scale = reference.quantize_activation(x, "token", EPS)
    t, w_scale = (part.cpu() for part in ops.quantize_weight(w.cuda(), config))
    wanted = grad.double() @ (t.double() * w_scale), grad.double().t() @ (x_q.double() * x_scale)
    for value, expected in zip(ours, wanted, strict=True):
        assert (value.grad.cpu().double() - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer, x = qat.BitLinear(256, 64).cuda(), torch.randn(9, 256, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype and layer.weight.grad.dtype == torch.float32
    same(y, ops.bitlinear(x.to(dtype), layer.weight, layer.bias))


def test_no_op_waits_for_the_device():
    layer, x = qat.BitLinear(128, 96).cuda(), torch.randn(20, 128, device="cuda", requires_grad=True)
    packed = [qat.PackedBitLinear.from_bitlinear(layer, layout) for layout in LAYOUTS]

    def all_of_them() -> None:
        for backward in ("input", "bf16", "int8"):
            ops.bitlinear(x, layer.weight, layer.bias, QuantConfig(backward=backward)).sum().backward()
        with torch.no_grad():
            for one in packed:
                one(x), one(x[:1])
        ops.quantize_activation(x.detach(), "tensor")

    all_of_them()
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_of_them()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream():
    """The input is written late on a side stream; a kernel on another stream would read zeros."""
    x, packed = torch.randn(4, 512), packing.pack_ternary(codes(64, 512), "2bit")
    wanted = reference.packed_linear(x, packed, torch.ones(1, 1), None, 512, "2bit", 8, "token", EPS)
    late, source, bytes_ = torch.zeros(4, 512, device="cuda"), x.cuda(), packed.cuda()
    scale, busy = torch.ones(1, 1, device="cuda"), torch.randn(4096, 4096, device="cuda")
    ops.packed_linear(late, bytes_, scale, in_features=512)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            busy = busy @ busy * 1e-4
        late.copy_(source)
        y = ops.packed_linear(late, bytes_, scale, in_features=512)
    torch.cuda.synchronize()
    same(y, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 40])
def test_cuda_graph_of_packed_layers(m, layout):
    layers = [qat.PackedBitLinear.from_bitlinear(qat.BitLinear(96, 96).cuda(), layout) for _ in range(4)]
    x = torch.randn(m, 96, device="cuda")

    def run() -> Tensor:
        y = x
        for layer in layers:
            y = layer(y)
        return y

    with torch.no_grad():
        run(), run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        for seed in range(3):
            x.copy_(tokens(m, 96, seed=seed))
            graph.replay()
            torch.cuda.synchronize()
            captured = y.clone()
            same(captured, run())


def test_cuda_graph_of_a_training_step_follows_the_weight():
    layer, x = qat.BitLinear(64, 48, bias=False).cuda(), torch.randn(32, 64, device="cuda")

    def step() -> Tensor:
        y = layer(x)
        (grad,) = torch.autograd.grad(y.square().sum(), layer.weight)
        with torch.no_grad():
            layer.weight.data.add_(grad, alpha=-1e-3)  # counts no version
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(), step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for _ in range(3):
        wanted = ops.bitlinear(x, layer.weight.detach().clone())
        graph.replay()
        torch.cuda.synchronize()
        same(y, wanted)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backward", ["input", "bf16", "int8"])
def test_compile_fullgraph(backward, backend):
    if backend == "inductor":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    layer = qat.BitLinear(32, 24, config=QuantConfig(backward=backward, kernels="compiled")).cuda()
    packed, x = qat.PackedBitLinear.from_bitlinear(layer), torch.randn(5, 32, device="cuda")
    eager, wanted = layer(x), packed(x).detach()
    eager.square().sum().backward()
    gradient, layer.weight.grad = layer.weight.grad.clone(), None
    compiled = torch.compile(layer, fullgraph=True, backend=backend)(x)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(layer.weight.grad, gradient, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        same(torch.compile(packed, fullgraph=True, backend=backend)(x), wanted)


def test_opcheck():
    weight, x = (torch.randn(size, device="cuda", requires_grad=True) for size in ((8, 16), (3, 16)))
    bias, packed = torch.randn(8, device="cuda"), packing.pack_ternary(codes(8, 16), "2bit").cuda()
    check = torch.library.opcheck
    check(torch.ops.qat.bitlinear.default, (x, weight, bias, [], *training_options(QuantConfig())))
    scale = torch.rand(1, 1, device="cuda")
    check(torch.ops.qat.packed_linear.default, (x, packed, scale, bias, 16, "2bit", 8, "token", EPS))
    check(torch.ops.qat.quantize_activation.default, (x.detach(), "token", EPS))
    check(torch.ops.qat.quantize_weight.default, (weight.detach(), [], *weight_options(QuantConfig(granularity="channel"))))
    check(torch.ops.qat.quantized_matmul.default, (torch.randn(3, 8, device="cuda"), codes(8, 16).cuda(), EPS))
    check(torch.ops.qat.int8_matmul.default, (codes(8, 16).cuda(), codes(16, 5).cuda()))


def test_the_reference_on_the_device_gives_the_same_bits():
    x, packed = tokens(7, 96, torch.bfloat16).cuda(), packing.pack_ternary(codes(40, 96), "2bit").cuda()
    scale = torch.rand(40, 1, device="cuda")
    found, wanted = (ops.packed_linear(x, packed, scale, in_features=96, kernels=kind) for kind in ("compiled", "reference"))
    same(found, wanted)


def test_mixed_devices_are_named():
    x, w = torch.zeros(2, 8, device="cuda"), torch.zeros(3, 8)
    with pytest.raises(ValueError, match="weight is on cpu, but x is on cuda:0"):
        ops.bitlinear(x, w)
    with pytest.raises(ValueError, match="bias is on cpu, but x is on cuda:0"):
        ops.bitlinear(x, w.cuda(), torch.zeros(3))
    packed = torch.zeros(3, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="packed is on cuda:0, but x is on cpu"):
        ops.packed_linear(w[:2], packed.cuda(), torch.ones(1, 1), in_features=8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: ops.bitlinear(x.int(), w), "x must be a floating-point tensor"),
        (lambda x, w: ops.bitlinear(x[:, :7], w), "x has 7 features in its last dimension, but the layer has in_features=8"),
        (lambda x, w: ops.bitlinear(x, w, w[:, 0].int()), r"bias must be floating point \[3\]"),
        (
            lambda x, w: ops.quantize_weight(w, QuantConfig(granularity="group", group_size=3)),
            "multiple of quant.group_size=3",
        ),
        (lambda x, w: ops.packed_linear(x, w, x, in_features=8), r"packed must be uint8 \[N, 2\] for in_features=8"),
    ],
)
def test_wrong_arguments_have_the_messages_of_the_cpu(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 8, device="cuda"), torch.zeros(3, 8, device="cuda"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one():
    layer = qat.BitLinear(64, 48)
    x = tokens(5, 64)
    wanted, place = layer.to("cuda:0")(x.to("cuda:0")), torch.cuda.current_device()
    y = layer.to("cuda:1")(x.to("cuda:1"))
    y.sum().backward()
    assert y.device.index == 1 and torch.cuda.current_device() == place
    same(y, wanted)
