"""Layers that get the same x quantize it once while they train on a GPU: never another x, and nothing lives longer for it."""

from __future__ import annotations

import pytest
import torch
from test_cuda import emulation as emulation
from test_cuda import place as place
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from qat import BitLinear, QuantConfig
from qat.ops.fused import cuda as fused

M, N, K = 5, 21, 36


class Layer:
    """A weight, how it is called, and what its nodes have saved of x since."""

    def __init__(self, device, **config):
        self.weight = torch.randn(N, K, device=device, requires_grad=True)
        self.ops = fused.ops_for(QuantConfig(**config), self.weight.detach())

    def __call__(self, x):
        return self.ops.forward(x, self.weight, None, *self.ops.arguments)

    def kept_of(self, x):
        """(y, what its node saves of x)."""
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
            return self(x), saved[0]


def shares(first, second, x, other=None):
    """Whether the second layer takes what the first has kept of x."""
    (_, a), (_, b) = first.kept_of(x), second.kept_of(x if other is None else other)
    return a.data_ptr() == b.data_ptr()


@pytest.fixture
def pair(place):
    torch.manual_seed(0)
    return Layer(place[0]), Layer(place[0])


def passes(layers, inputs, gradient):
    """Outputs and gradients of layers, each with its input."""
    outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    torch.autograd.backward(outputs, [gradient] * len(layers))
    found = [*outputs, *[layer.weight.grad for layer in layers]]
    for layer in layers:
        layer.weight.grad = None
    return found


@pytest.mark.parametrize("config", [{}, {"granularity": "channel", "backward": "bf16"}, {"act_granularity": "tensor"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_bit(place, config, dtype):
    device, _ = place
    layers = [Layer(device, **config) for _ in range(3)]
    x = torch.randn(2, M, K, device=device).to(dtype).requires_grad_()
    gradient = torch.randn(2, M, N, device=device).to(dtype)
    assert shares(layers[0], layers[1], x) and not shares(layers[0], layers[1], x, x.clone())
    shared = [*passes(layers, [x] * 3, gradient), x.grad]
    leaves = [x.detach().clone().requires_grad_() for _ in range(3)]
    apart = [*passes(layers, leaves, gradient), sum(leaf.grad for leaf in reversed(leaves))]
    assert all(torch.equal(one, other) for one, other in zip(shared, apart, strict=True))


def test_x_that_has_changed_is_another(place, pair):
    first, second = pair
    x = torch.randn(M, K, device=place[0])
    y, kept = first.kept_of(x)
    x.mul_(2)
    assert second.kept_of(x)[1].data_ptr() != kept.data_ptr()
    y, kept = first.kept_of(x)
    x.data = torch.randn(M, K, device=place[0])  # counts no version
    again, other = second.kept_of(x)
    assert other.data_ptr() != kept.data_ptr() and torch.equal(again, second(x.clone()))
    y, kept = first.kept_of(x)
    x.data = x.data[[1, 0, 2, 3, 4]]
    assert second.kept_of(x)[1].data_ptr() != kept.data_ptr()
    x = torch.randn(K, K, device=place[0])
    y, kept = first.kept_of(x)
    x.data = x.data.t()  # the same memory, otherwise read
    again, other = second.kept_of(x)
    assert other.data_ptr() != kept.data_ptr() and torch.equal(again, second(x.contiguous()))


def test_views_of_the_same_memory_are_others(place, pair):
    x = torch.randn(M, K, device=place[0])
    assert shares(*pair, x)
    for other in (x[:], x.detach(), x.view(1, M, K), x.T.contiguous().T):
        assert not shares(*pair, x, other)


@pytest.mark.parametrize("config", [{"eps": 0.5}, {"act_granularity": "tensor"}], ids=str)
def test_otherwise_quantized_it_is_another(place, config):
    x = torch.randn(M, K, device=place[0]) / 10
    plain, other = Layer(place[0]), Layer(place[0], **config)
    assert not shares(plain, other, x) and not shares(other, plain, x)
    assert shares(other, other, x)


def test_under_autocast_it_is_another(place, pair):
    first, second = pair
    x = torch.randn(M, K, device=place[0])
    y, kept = first.kept_of(x)
    with torch.autocast(place[0].type, torch.bfloat16):
        assert second.kept_of(x)[1].data_ptr() != kept.data_ptr()
        assert shares(first, second, x)


def test_nothing_lives_longer(place, pair):
    """What is kept goes with the nodes that saved it, before x or after."""
    first, second = pair
    x = torch.randn(M, K, device=place[0])
    y, kept = first.kept_of(x)
    memory, of_x = StorageWeakRef(kept.untyped_storage()), StorageWeakRef(x.untyped_storage())
    del kept
    assert not memory.expired()
    y.sum().backward()
    del y
    assert memory.expired() and not of_x.expired()
    y = second(x)
    del x
    assert of_x.expired()
    y.sum().backward()
    assert torch.isfinite(second.weight.grad).all()


def test_x_that_counts_no_versions_is_quantized_anew(place, pair):
    with torch.inference_mode():
        x = torch.randn(M, K, device=place[0])
    assert not shares(*pair, x)
    pair[0](x)
    with torch.inference_mode():
        x.mul_(-1)
    assert torch.equal(pair[1](x), pair[1](x.clone()))


def test_without_gradients_nothing_is_known(place, pair):
    x = torch.randn(M, K, device=place[0])
    y = pair[0](x)
    with torch.no_grad():
        z = pair[1](x)
    assert torch.equal(z, pair[1](x)) and not z.requires_grad and y.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(place, pair, reentrant):
    x = torch.randn(M, K, device=place[0], requires_grad=True)
    both = lambda x: pair[0](x) + pair[1](x)  # noqa: E731
    both(x).square().sum().backward()
    wanted = [x.grad, pair[0].weight.grad, pair[1].weight.grad]
    x.grad = pair[0].weight.grad = pair[1].weight.grad = None
    checkpoint(both, x, use_reentrant=reentrant).square().sum().backward()
    for one, other in zip([x.grad, pair[0].weight.grad, pair[1].weight.grad], wanted, strict=True):
        assert torch.equal(one, other)


def test_only_on_its_stream_and_in_its_capture(place, pair):
    """Elsewhere it may not be there yet, or belong to a graph that is run later."""
    device, _ = place
    x, layer = torch.randn(M, K, device=device), pair[0]

    def run(*known):
        arguments = *layer.ops.arguments[:-1], torch.float32
        return torch.ops.qat.cuda_fused_forward.default(x, layer.weight.detach(), None, *arguments, *known)

    y, kept, _, stream, capture = run(None, 0, 0)
    known = kept.clone()
    known[: M * K] = 0  # codes, so that outputs tell
    found = run(known, stream, capture)
    assert found[1].data_ptr() == known.data_ptr() and not found[0].any()
    for where in ((stream + 1, capture), (stream, capture + 1)):
        again, other, *_ = run(known, *where)
        assert other.data_ptr() != known.data_ptr() and torch.equal(again, y)
    again, other, *_ = run(known[:-16], stream, capture)  # freed and filled with something else
    assert torch.equal(other[: M * K], kept[: M * K]) and torch.equal(again, y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_a_graph_quantizes_an_input_that_was_quantized_before():
    """The codes of x that a layer keeps outside of the capture, for its backward pass, are not those of its replays."""
    first, second = (BitLinear(64, 48, bias=False).cuda() for _ in range(2))
    x = torch.randn(32, 64, device="cuda")
    second(x)
    torch.cuda.synchronize()
    held, graph = first(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = second(x)
    for _ in range(3):
        x.copy_(torch.randn(32, 64))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, second(x.clone()))
    assert held.requires_grad
