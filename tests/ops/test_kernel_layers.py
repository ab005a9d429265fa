"""Layers on the compiled CPU kernels, in training and packed: equal to the pure-torch reference on every path of this CPU."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from kernel_checks import CONFIGS, DTYPES, LAYOUTS, codes, configs, same, tokens
from torch import Tensor

import qat
from qat import ops
from qat.config import QuantConfig
from qat.ops import cpu

if not cpu.compiled():
    pytest.skip(f"no compiled kernels: {cpu.status().why}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("isa")  # every test runs on every instruction set


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


@pytest.mark.parametrize("backward", ["input", "bf16", "int8"])
def test_compile_fullgraph(backward, isa):
    if isa != cpu.paths()[-1]:
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
