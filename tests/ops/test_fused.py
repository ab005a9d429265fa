"""The one op of the training linear equals the many that it stands for, to the bit, and leaves to them what it does not know."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qat import BitLinear, QuantConfig, ops
from qat.ops import cpu
from qat.ops.fused.linear import FusedLinear
from qat.ops.soft.calls import soft_bitlinear

pytestmark = pytest.mark.skipif(not cpu.compiled(), reason="no compiled CPU kernels")

CONFIGS = {
    "tensor": {},
    "channel": {"granularity": "channel"},
    "group": {"granularity": "group", "group_size": 20},
    "binary": {"weight": "binary", "granularity": "channel"},
    "bf16": {"backward": "bf16"},
    "bf16 channel": {"backward": "bf16", "granularity": "channel", "scale_dtype": "bfloat16"},
    "bf16 group": {"backward": "bf16", "granularity": "group", "group_size": 4},
    "float16 scale": {"scale_dtype": "float16", "scale_multiplier": 1.25},
    "per tensor": {"act_granularity": "tensor", "eps": 0.05},
}
SHAPES = [(40,), (3, 40), (2, 3, 40)]
N = 70


def layer_of(config: dict[str, object], bias: torch.dtype | None) -> BitLinear:
    torch.manual_seed(1)
    layer = BitLinear(40, N, bias is not None, QuantConfig(**config))
    if bias is not None:
        layer.bias = nn.Parameter(torch.randn(N).to(bias))
    return layer


def passes(run: object, layer: BitLinear, x: Tensor, autocast: torch.dtype | None) -> list[Tensor]:
    """The output, and the gradients of the input and of everything trained."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        y = run(x)  # type: ignore[operator]
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))
    found = [y.detach(), x.grad, *[p.grad for p in layer.parameters()]]
    layer.zero_grad()
    return found


def through_ops(layer: BitLinear, x: Tensor) -> Tensor:
    return ops.bitlinear(x, layer.weight, layer.bias, layer.config)


def serving(layer: BitLinear, x: Tensor) -> bool:
    return layer._current(layer.weight)(x, layer.weight, layer.bias) is not None


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (
            torch.equal(one, other) or (one.isnan() == other.isnan()).all() and torch.equal(one.nan_to_num(), other.nan_to_num())
        )


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_the_bit(name: str, bias: torch.dtype | None, autocast: torch.dtype | None) -> None:
    layer = layer_of(CONFIGS[name], bias)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(shape).to(dtype)
            assert serving(layer, x)
            same(passes(layer, layer, x, autocast), passes(lambda x: through_ops(layer, x), layer, x, autocast))
    found = layer(torch.ones(1, 2, 40, dtype=torch.float32).transpose(0, 1))
    assert torch.equal(found, through_ops(layer, torch.ones(2, 1, 40)))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tensor", "channel", "group", "binary", "float16 scale"])
def test_soft_codes_equal_to_the_bit(name: str, autocast: torch.dtype | None) -> None:
    for bias in (None, torch.float32):
        layer = layer_of(CONFIGS[name], bias)
        for beta in (2.0, 60.0):
            layer.set_beta(beta)
            for shape in SHAPES:
                x = torch.randn(shape)
                assert layer._current(layer.weight)(x, layer.weight, layer.bias, layer.beta) is not None
                wanted = passes(lambda x: softly(layer, x), layer, x, autocast)  # noqa: B023
                same(passes(layer, layer, x, autocast), wanted)
    with torch.no_grad():
        assert torch.equal(layer(x), softly(layer, x))
    y = layer(x.requires_grad_())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].sum().backward()
    assert not torch.equal(y, layer.eval()(x))


def softly(layer: BitLinear, x: Tensor) -> Tensor:
    return soft_bitlinear(x, layer.weight, layer.bias, layer.beta, layer.config)


def test_weights_are_taken_as_they_are_now() -> None:
    """Also where nothing counts the change."""
    layer, x = layer_of({}, None), torch.randn(3, 40)
    before = layer(x)
    layer.weight.data.mul_(-1)
    assert torch.equal(layer(x), -before)
    layer.weight = nn.Parameter(layer.weight.detach() * -1)
    assert torch.equal(layer(x), before)
    layer.config.eps = 10.0  # changed in place
    same(passes(layer, layer, x, None), passes(lambda x: through_ops(layer, x), layer, x, None))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-30, 3e38])
def test_odd_weights_and_inputs(value: float) -> None:
    for config in ({}, {"weight": "binary"}, {"granularity": "channel", "scale_dtype": "float16"}, {"backward": "bf16"}):
        layer, x = layer_of(config, torch.float32), torch.randn(4, 40)
        x[1] = value
        same(passes(layer, layer, x, None), passes(lambda x: through_ops(layer, x), layer, x, None))  # noqa: B023
        layer.weight.data[3] = value
        same(passes(layer, layer, x, None), passes(lambda x: through_ops(layer, x), layer, x, None))  # noqa: B023


def test_only_the_gradients_that_are_needed() -> None:
    layer, x = layer_of({}, torch.float32), torch.randn(3, 40)
    layer.weight.requires_grad_(False)
    y = layer(x)
    y.sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    with torch.no_grad():
        assert torch.equal(layer(x), y.detach())
    with torch.inference_mode():
        assert torch.equal(layer(x), y.detach())
    z = torch.randn(3, 40, requires_grad=True)
    (layer(z) * 0 + z.sum()).sum().backward()
    assert z.grad is not None


def test_second_derivatives_are_refused() -> None:
    layer, x = layer_of({}, None), torch.randn(3, 40, requires_grad=True)
    y = layer(x)
    assert "autograd" in y.grad_fn.name() and "Linear" in y.grad_fn.name()  # of C++, not of Python
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_checkpointing_saves_and_runs_again() -> None:
    layer, x = layer_of({}, torch.float32), torch.randn(3, 40)
    wanted = passes(layer, layer, x, None)
    same(passes(lambda x: checkpoint(layer, x, use_reentrant=False), layer, x, None), wanted)


class Names(TorchDispatchMode):
    """Notes the ops that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_who_looks_at_ops_sees_those_of_qat() -> None:
    layer, x = layer_of({}, None), torch.randn(3, 40)
    wanted = layer(x)
    with Names() as names:
        assert torch.equal(layer(x), wanted)
    assert "qat.bitlinear.default" in names.seen
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), wanted)
    exported = torch.export.export(layer, (x,))
    assert any("qat.bitlinear" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(torch.func.functional_call(layer, {"weight": layer.weight.detach()}, (x,)), wanted)


@pytest.mark.parametrize(
    "config",
    [
        {"kernels": "reference"},
        {"backward": "int8"},
        {"act_bits": None},
        {"act_bits": 4},
        {"scale": "absmax"},
        {"components": 2},
        {"weight": "twn"},
        {"weight": "lsq"},
    ],
    ids=str,
)
def test_what_it_does_not_know_is_left_to_the_ops(config: dict[str, object]) -> None:
    layer, x = layer_of(config, None), torch.randn(3, 40)
    assert not serving(layer, x)
    assert layer(x).shape == (3, N)


def test_wrong_inputs_get_the_words_of_the_ops() -> None:
    layer = layer_of({}, None)
    layer(torch.randn(2, 40))
    with pytest.raises(ValueError, match="x has 39 features in its last dimension"):
        layer(torch.randn(2, 39))
    with pytest.raises(ValueError, match="floating-point"):
        layer(torch.ones(2, 40, dtype=torch.int64))
    assert layer(torch.randn(0, 40)).shape == (0, N)
    assert layer(torch.randn(2, 40).double()).dtype == torch.float64


def test_large_layers_keep_what_they_made() -> None:
    layer, x = BitLinear(512, 512, False, QuantConfig()), torch.randn(2, 512)
    assert not serving(layer, x)


def test_copies_go_without_it() -> None:
    layer, x = layer_of({}, None), torch.randn(3, 40)
    wanted = layer(x)
    assert isinstance(layer._fused, FusedLinear)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._fused is None
        assert torch.equal(twin(x), wanted)
