"""The CUDA ops against the pure-torch reference on the CPU: equal to the bit, given the same weight scale.

`TestSmall` runs on a GPU where there is one, and everywhere on the CPU: csrc/ops_cuda.cpp and the kernels are then compiled
for the emulation, so that the binding and qat/ops/cuda.py are tested too. `TestDevice` needs a GPU. Where nothing needs one,
see also test_cuda_build.py, and test_cuda_emulation.py for the kernels alone.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import qat
from qat import ops, packing, quantizers
from qat.config import QuantConfig
from qat.ops import cuda, reference
from qat.ops.options import PackedOptions, TrainingOptions, WeightOptions

NO_GPU = None if torch.cuda.is_available() else "no GPU that torch can use"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["2bit", "base3"]
EPS = 1e-5
# M, N, K: one token, a few, many; widths that are and are not multiples of what the kernels read at once
SMALL = [(1, 1, 1), (1, 70, 256), (1, 33, 81), (3, 65, 79), (5, 17, 33), (17, 130, 128), (66, 40, 192)]
CONFIGS = {
    "default": QuantConfig(),
    "binary": QuantConfig(weight="binary"),
    "channel": QuantConfig(granularity="channel", scale_dtype="bfloat16"),
    "group": QuantConfig(granularity="group", group_size=24, scale="absmax"),
    "absmedian": QuantConfig(act_granularity="tensor", scale="absmedian", scale_dtype="float16"),
    "binary channel": QuantConfig(weight="binary", granularity="channel"),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def same(a: Tensor, b: Tensor) -> None:
    a, b = a.detach().cpu(), b.detach().cpu()
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} differ, by up to {(a.double() - b.double()).abs().max()}"


def inputs(m: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-4, 3, max(m, 1))[:m, None]
    if m > 2:
        x[1] = 0  # an all-zero token
    return x.to(dtype)


def codes(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.randint(-1, 2, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def weight_options(c: QuantConfig) -> WeightOptions:
    return WeightOptions(c.weight, c.scale, c.granularity, c.group_size, c.scale_dtype, c.eps)


def training_options(c: QuantConfig) -> TrainingOptions:
    *how, eps = weight_options(c)
    return TrainingOptions(*how, c.act_bits, c.act_granularity, eps, c.backward)


def emulated_library() -> Path:
    """csrc/ops_cuda.cpp for the emulation, linked with the emulated kernels; kept beside them."""
    from test_cuda_emulation import COMPILER, FLAGS, ROOT, compiled

    kernels, source, torch_folder = compiled(), ROOT / "csrc" / "ops_cuda.cpp", Path(torch.__file__).parent
    content = source.read_bytes() + (ROOT / "csrc" / "cuda" / "kernels.h").read_bytes() + torch.__version__.encode()
    library = kernels.parent / f"ops-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        command = [str(COMPILER), *FLAGS, "-DTORCH_TARGET_VERSION=0x020b000000000000", "-shared", "-o", str(made), str(source)]
        command += ["-isystem", str(torch_folder / "include"), "-x", "none", str(kernels)]
        command += [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", "-Wl,-z,defs"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ops_cuda.cpp does not compile for the emulation:\n{done.stderr[:3000]}"
        made.rename(library)
    return library


@pytest.fixture(scope="session")
def emulation() -> None:
    torch.ops.load_library(emulated_library())


Op = Callable[..., Any]


def on_the_gpu(name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.qat, name)(*arguments)


@pytest.fixture(params=["emulated" if NO_GPU else "cuda"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[torch.device, Op]]:
    """A device, and a function that calls an op there by its name."""
    if request.param == "cuda":
        yield torch.device("cuda"), on_the_gpu
        return
    request.getfixturevalue("emulation")
    monkeypatch.setattr(cuda, "_serves", lambda x, k=0: k <= cuda.MAX_WIDTH)
    stream = SimpleNamespace(record_event=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield torch.device("cpu"), lambda name, *arguments: cuda.KERNELS[name](*arguments)
    cuda.clear_caches()


class TestSmall:
    """Every op on small and odd shapes; what compute-sanitizer runs too."""

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    @pytest.mark.parametrize("granularity", ["token", "tensor"])
    def test_quantize_activation(self, place, granularity, dtype):
        device, op = place
        for m, k in ((1, 1), (5, 37), (9, 256), (0, 8), (3, 1000)):
            x = inputs(m, k, dtype)
            found = op("quantize_activation", x.to(device), granularity, EPS)
            for a, b in zip(found, reference.quantize_activation(x, granularity, EPS), strict=True):
                same(a, b)

    def test_quantize_activation_of_views(self, place):
        device, op = place
        whole = inputs(24, 96).reshape(2, 12, 96)
        for x in (whole[..., ::2], whole[..., 48:], whole.transpose(0, 1), whole[0, 0], whole[0]):
            found = op("quantize_activation", x.to(device), "token", EPS)
            for a, b in zip(found, reference.quantize_activation(x, "token", EPS), strict=True):
                same(a, b)

    @configs
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_quantize_weight(self, place, config, dtype):
        device, op = place
        for n, k in ((40, 72), (3, 24), (1, 120)):
            w = (torch.randn(n, k) * 0.02).to(dtype)
            t, scale = op("quantize_weight", w.to(device), *weight_options(config))
            check_weight_codes(w, t.cpu(), scale.cpu(), config)

    @pytest.mark.parametrize("granularity", ["tensor", "channel"])
    def test_weight_straight_to_two_bits(self, place, granularity):
        device, _ = place
        w, options = torch.randn(7, 30), weight_options(QuantConfig(granularity=granularity))
        arguments = cuda.weight_arguments(w.to(device), options)
        (t, scale), (packed, again) = (torch.ops.qat.cuda_quantize_weight(w.to(device), *arguments, two) for two in (False, True))
        same(packed, packing.pack_ternary(t.cpu(), "2bit"))
        same(scale, again)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_pack_and_unpack(self, place, layout):
        device, op = place
        for n, k in ((1, 1), (5, 7), (3, 80), (9, 161)):
            t = codes(n, k)
            packed = op("pack_ternary", t.to(device), layout)
            same(packed, packing.pack_ternary(t, layout))
            same(op("unpack_ternary", packed, k, layout), t)
        for other in (codes(4, 9).int(), codes(4, 9) * 0 + 1):
            same(op("pack_ternary", other.to(device), layout), packing.pack_ternary(other, layout))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_bad_codes_have_the_messages_of_the_cpu(self, place, layout):
        device, op = place
        t = codes(4, 9)
        t[2, 3], t[3, 1] = 2, -2
        with pytest.raises(ValueError, match=r"t\[2, 3\] = 2 is not a ternary code"):
            op("pack_ternary", t.to(device), layout)
        packed = packing.pack_ternary(codes(4, 9), layout)
        packed[1, 1] = 255
        with pytest.raises(ValueError, match=rf"packed\[1, 1\] = 255 holds no ternary codes in layout {layout}"):
            op("unpack_ternary", packed.to(device), 9, layout)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SMALL, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_packed_linear(self, place, shape, layout, dtype):
        m, n, k = shape
        x, packed = inputs(m, k, dtype), packing.pack_ternary(codes(n, k), layout)
        for scale, bias in ((torch.tensor([[0.02]]), None), (torch.rand(n, 1) + 0.01, torch.randn(n))):
            check_packed_linear(place, x, packed, scale, bias, k, layout, "token")
        check_packed_linear(place, x, packed, torch.tensor([[0.02]]), None, k, layout, "tensor")

    @pytest.mark.parametrize("k,groups", [(96, 3), (320, 2), (320, 4), (90, 6), (33, 11)])
    @pytest.mark.parametrize("m", [1, 7])
    def test_packed_linear_with_groups(self, place, m, k, groups):
        x, packed, scale = inputs(m, k), packing.pack_ternary(codes(70, k), "2bit"), torch.rand(70, groups) + 0.01
        for one in (scale, scale[:1].contiguous()):
            check_packed_linear(place, x, packed, one, torch.randn(70), k, "2bit", "token")

    @configs
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_bitlinear(self, place, config, dtype):
        device, op = place
        x, w, bias = inputs(22, 72, dtype).reshape(2, 11, 72), torch.randn(40, 72), torch.randn(40)
        found = op("bitlinear", *(value.to(device) for value in (x, w, bias)), *training_options(config))
        y, x_q, x_scale, t, scale = (value.cpu() for value in found)
        check_weight_codes(w, t, scale, config)
        wanted, divisor = quantizers.activation_codes(x, config.act_granularity, config.eps)
        same(x_q, wanted)
        same(x_scale, 1 / divisor)
        same(y, reference.integer_linear(x_q, divisor, t, scale, bias, dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_matmuls_of_the_int8_backward(self, place, dtype):
        device, op = place
        for m, n, k in ((1, 3, 5), (20, 33, 48), (64, 16, 80)):
            grad, t = inputs(m, n, dtype), codes(n, k)
            same(op("quantized_matmul", grad.to(device), t.to(device), 1e-30), reference.quantized_matmul(grad, t, 1e-30))
            a, b = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((n, m), (m, k)))
            same(op("int8_matmul", a.to(device), b.to(device)), (a.double() @ b.double()).int())

    def test_rounding_and_extreme_values(self, place):
        device, op = place
        limit = torch.finfo(torch.float16).max
        for x in (
            torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 3.5] * 5]),
            torch.tensor([[limit, -limit, 6e-8, 0, 1], [1e-7, 6e-8, 0, 0, 0]], dtype=torch.float16),
        ):
            for a, b in zip(
                op("quantize_activation", x.to(device), "token", EPS), reference.quantize_activation(x, "token", EPS), strict=True
            ):
                same(a, b)
        x, packed = torch.tensor([[float("nan"), 1, 2, 3], [1, 2, 3, 4]]), packing.pack_ternary(codes(9, 4), "2bit")
        y = op(
            "packed_linear", x.to(device), packed.to(device), torch.ones(1, 1, device=device), None, 4, "2bit", 8, "token", EPS
        )
        assert y[0].isnan().all() and y[1].isfinite().all()

    def test_empty_sizes(self, place):
        device, op = place
        w, empty = torch.randn(6, 20, device=device), torch.zeros(0, 20, device=device)
        y, x_q, x_scale, t, _ = op("bitlinear", empty, w, None, *training_options(QuantConfig()))
        assert y.shape == (0, 6) and x_q.shape == (0, 20) and x_scale.shape == (0, 1) and t.shape == (6, 20)
        packed = packing.pack_ternary(codes(6, 20), "2bit").to(device)
        assert op("packed_linear", empty, packed, torch.ones(1, 1, device=device), None, 20, "2bit", 8, "token", EPS).shape == (
            0,
            6,
        )

    def test_base3_weights_are_repacked_once_and_again_when_they_change(self, place):
        device, op = place
        packed = packing.pack_ternary(codes(8, 64), "base3").to(device)
        first = cuda.two_bit(packed, 64, "base3")
        assert cuda.two_bit(packed, 64, "base3") is first
        same(first, packing.pack_ternary(codes(8, 64), "2bit"))
        packed.copy_(packing.pack_ternary(codes(8, 64, 7), "base3"))
        again = cuda.two_bit(packed, 64, "base3")
        same(again, packing.pack_ternary(codes(8, 64, 7), "2bit"))
        assert again.data_ptr() == first.data_ptr()  # a captured graph reads it there
        for seed in range(20):  # freed tensors whose memory is used again
            other = packing.pack_ternary(codes(8, 64, seed), "base3").to(device)
            same(cuda.two_bit(other, 64, "base3"), packing.pack_ternary(codes(8, 64, seed), "2bit"))
            del other
        assert len(cuda._bits.entries) < 10
        with torch.inference_mode():
            unversioned = packing.pack_ternary(codes(8, 64), "base3").to(device)
            for seed in (3, 4):
                unversioned.copy_(packing.pack_ternary(codes(8, 64, seed), "base3"))
                same(cuda.two_bit(unversioned, 64, "base3"), packing.pack_ternary(codes(8, 64, seed), "2bit"))

    def test_prepared_calls(self, place):
        device, _ = place
        x, scale, options = inputs(1, 64), torch.rand(1, 1), PackedOptions(64, "base3", 8, "token", EPS)
        packed = packing.pack_ternary(codes(8, 64), "base3")
        run, first, later = cuda.linear_call(packed.to(device), scale.to(device), None, options)
        assert first[-1] is False and later[-1] is True
        for arguments in (first, later):
            same(run(x.to(device), *arguments), reference.packed_linear(x, packed, scale, None, *options))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda q, z: q.cuda_quantize_activation(z(2, 8).int(), False, EPS), "expected float32"),
            (lambda q, z: linear(q, z(2, 8), z(3, 2), z(1, 1)), "packed has a wrong dtype"),
            (lambda q, z: linear(q, z(2, 8), z(3, 1).byte(), z(1, 1)), "packed does not fit K = 8"),
            (lambda q, z: linear(q, z(2, 8), z(3, 2).byte(), z(2, 1)), "scale must be"),
            (lambda q, z: linear(q, z(2, 8), z(3, 2).byte(), z(1, 3)), "unsupported K = 8 in 3 groups"),
            (lambda q, z: linear(q, z(2, 8), z(3, 2).byte(), z(1, 1), z(2)), "bias must be"),
            (lambda q, z: linear(q, z(2, 7), z(3, 2).byte(), z(1, 1)), r"x must be \[..., 8\]"),
            (lambda q, z: q.cuda_bitlinear(z(2, 8), z(3, 7).char(), z(1, 1), None, False, EPS), r"t must be \[N, 8\]"),
            (lambda q, z: q.cuda_int8_matmul(z(2, 8).char(), z(3, 7).char()), "a and b must be"),
            (lambda q, z: q.cuda_quantize_weight(z(2, 8), 2, 0, 3, False, 0, EPS, None, False), "in 3 groups"),
            (lambda q, z: q.cuda_repack(z(2, 8).byte(), 8), "packed does not fit K = 8"),
        ],
    )
    def test_the_binding_refuses_what_the_kernels_cannot_do(self, place, call, message):
        device, _ = place
        with pytest.raises(RuntimeError, match=message):
            call(torch.ops.qat, lambda *size: torch.zeros(*size, device=device))


def linear(namespace: Any, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return namespace.cuda_packed_linear(x, packed, scale, bias, 8, False, EPS, False)


def check_weight_codes(w: Tensor, t: Tensor, scale: Tensor, config: QuantConfig) -> None:
    """The scale is the reference's but for the order of the sum; the codes are those of this very scale."""
    o = weight_options(config)
    rows, wanted, shape = quantizers.weight_scale(w, *o[1:])
    assert scale.dtype == torch.float32 and scale.shape == shape and t.shape == w.shape and t.dtype == torch.int8
    rounding = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}[config.scale_dtype]  # a neighbour of the wanted one
    torch.testing.assert_close(scale, wanted.reshape(shape), rtol=rounding, atol=0)
    expected = quantizers.SCHEMES[config.weight](rows, scale.reshape(-1, 1)).to(torch.int8).reshape(w.shape)
    same(t, expected)


def check_packed_linear(
    place: tuple[torch.device, Op],
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    layout: str,
    granularity: str,
) -> None:
    device, op = place
    options = PackedOptions(k, layout, 8, granularity, EPS)
    moved = [None if value is None else value.to(device) for value in (x, packed, scale, bias)]
    same(op("packed_linear", *moved, *options), reference.packed_linear(x, packed, scale, bias, *options))


@pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
class TestDevice:
    """What only a GPU can show: large shapes, streams, graphs, compilation, gradients, messages."""

    # decode and prefill of real models, odd shapes, and enough blocks for Hopper's own matmul, at edges of its tiles
    LARGE = [(1, 2560, 6912), (2, 13824, 2560), (16, 3840, 2560), (129, 577, 1537), (512, 2560, 2560), (1100, 2601, 2560)]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", LARGE, ids=str)
    def test_packed_linear_large(self, shape, dtype):
        m, n, k = shape
        place = torch.device("cuda"), on_the_gpu
        packed = packing.pack_ternary(codes(n, k), "2bit")
        check_packed_linear(place, inputs(m, k, dtype), packed, torch.rand(n, 1) + 0.01, torch.randn(n), k, "2bit", "token")

    @pytest.mark.parametrize("shape", [(300, 577, 1537), (1024, 2560, 2560), (33, 6912, 2560), (1100, 2601, 2576)], ids=str)
    def test_bitlinear_large(self, shape):
        m, n, k = shape
        x, w = inputs(m, k, torch.bfloat16), torch.randn(n, k) * 0.02
        y, x_q, _, t, scale = (
            v.cpu() for v in torch.ops.qat.bitlinear(x.cuda(), w.cuda(), None, *training_options(QuantConfig()))
        )
        check_weight_codes(w, t, scale, QuantConfig())
        wanted, divisor = quantizers.activation_codes(x, "token", EPS)
        same(x_q, wanted)
        same(y, reference.integer_linear(x_q, divisor, t, scale, None, x.dtype))

    def test_the_kernels_are_compiled_and_kernels_compiled_is_honoured(self):
        found = ops.backend()["cuda"]
        assert found["kernels"] == "compiled", found["why"]
        layer = qat.BitLinear(64, 32, config=QuantConfig(kernels="compiled")).cuda()
        packed = qat.PackedBitLinear.from_bitlinear(layer)
        x = torch.randn(3, 64, device="cuda")
        with torch.no_grad():
            same(packed(x), layer(x))

    @pytest.mark.parametrize("backward,limit", [("input", 1e-6), ("bf16", 4e-3), ("int8", 1.5e-2)])
    @pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(granularity="channel")], ids=["tensor", "channel"])
    def test_gradients(self, backward, limit, config):
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
    def test_autocast(self, dtype):
        layer, x = qat.BitLinear(256, 64).cuda(), torch.randn(9, 256, device="cuda")
        with torch.autocast("cuda", dtype=dtype):
            y = layer(x)
        y.float().square().sum().backward()
        assert y.dtype == dtype and layer.weight.grad.dtype == torch.float32
        same(y, ops.bitlinear(x.to(dtype), layer.weight, layer.bias))

    def test_no_op_waits_for_the_device(self):
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

    def test_the_current_stream(self):
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
    def test_cuda_graph_of_packed_layers(self, m, layout):
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
                x.copy_(inputs(m, 96, seed=seed))
                graph.replay()
                torch.cuda.synchronize()
                captured = y.clone()
                same(captured, run())

    def test_cuda_graph_of_a_training_step_follows_the_weight(self):
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
    def test_compile_fullgraph(self, backward, backend):
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

    def test_opcheck(self):
        weight, x = (torch.randn(size, device="cuda", requires_grad=True) for size in ((8, 16), (3, 16)))
        bias, packed = torch.randn(8, device="cuda"), packing.pack_ternary(codes(8, 16), "2bit").cuda()
        check = torch.library.opcheck
        check(torch.ops.qat.bitlinear.default, (x, weight, bias, *training_options(QuantConfig())))
        scale = torch.rand(1, 1, device="cuda")
        check(torch.ops.qat.packed_linear.default, (x, packed, scale, bias, 16, "2bit", 8, "token", EPS))
        check(torch.ops.qat.quantize_activation.default, (x.detach(), "token", EPS))
        check(torch.ops.qat.quantize_weight.default, (weight.detach(), *weight_options(QuantConfig(granularity="channel"))))
        check(torch.ops.qat.quantized_matmul.default, (torch.randn(3, 8, device="cuda"), codes(8, 16).cuda(), EPS))
        check(torch.ops.qat.int8_matmul.default, (codes(8, 16).cuda(), codes(16, 5).cuda()))

    def test_the_reference_on_the_device_gives_the_same_bits(self):
        x, packed = inputs(7, 96, torch.bfloat16).cuda(), packing.pack_ternary(codes(40, 96), "2bit").cuda()
        scale = torch.rand(40, 1, device="cuda")
        found, wanted = (ops.packed_linear(x, packed, scale, in_features=96, kernels=kind) for kind in ("compiled", "reference"))
        same(found, wanted)

    def test_mixed_devices_are_named(self):
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
    def test_wrong_arguments_have_the_messages_of_the_cpu(self, call, message):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(2, 8, device="cuda"), torch.zeros(3, 8, device="cuda"))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
    def test_a_device_that_is_not_the_current_one(self):
        layer = qat.BitLinear(64, 48)
        x = inputs(5, 64)
        wanted, place = layer.to("cuda:0")(x.to("cuda:0")), torch.cuda.current_device()
        y = layer.to("cuda:1")(x.to("cuda:1"))
        y.sum().backward()
        assert y.device.index == 1 and torch.cuda.current_device() == place
        same(y, wanted)
