"""The GPU's one op of a training linear, each way, equals the ops that it stands for, to the bit; on a GPU, or emulated."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import same, tokens
from test_cuda import emulation as emulation
from test_cuda import place as place

from qat.config import QuantConfig
from qat.ops import gradients
from qat.ops.bits.kept import Kept
from qat.ops.fused import cuda as fused
from qat.ops.options import training_options

CONFIGS = [
    {},
    {"weight": "binary", "granularity": "channel"},
    {"scale": "absmax", "scale_dtype": "bfloat16"},
    {"granularity": "group", "group_size": 12, "backward": "bf16"},
    {"granularity": "channel", "backward": "bf16"},
    {"backward": "bf16", "act_granularity": "tensor"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_ops(place, config, dtype):
    device, op = place
    config, n, k = QuantConfig(**config), 21, 36
    x, w = tokens(10, k, torch.float32).reshape(2, 5, k).to(device), torch.randn(n, k, device=device)
    bias, grad = torch.randn(n, device=device), torch.randn(2, 5, n, device=device).to(dtype)
    found = fused.ops_for(config, w)
    granularity, _, groups, *_, bf16 = found.arguments
    y, *kept = torch.ops.qat.cuda_fused_forward.default(x, w, bias, *found.arguments[:-1], dtype, None, 0, 0)[:3]
    wanted, *parts = op("bitlinear", x.to(dtype), w, bias, [], *training_options(config))
    same(y, wanted)
    x_q, x_scale, codes, scale = parts
    for one, which in zip(kept_parts(*kept, x_q, codes, scale), (x_q, x_scale, codes, scale), strict=True):
        same(one, which)
    backward, of = torch.ops.qat.cuda_fused_gradients.default, (k, granularity, groups, bf16)
    of_x, of_w, of_bias = backward(grad, *kept, *of, torch.float32, True, torch.bfloat16)
    input_gradient, weight_gradient = gradients._MATMULS[config.backward]
    same(of_x, input_gradient(grad, Kept(codes, k), scale, 1).float())
    same(of_w, weight_gradient(grad, x_q, x_scale, torch.float32).float())
    same(of_bias, gradients.bias_gradient(grad).bfloat16())
    for one, which in zip(
        backward(grad, *elsewhere(kept), *of, torch.float32, True, torch.bfloat16), (of_x, of_w, of_bias), strict=True
    ):
        same(one, which)
    assert backward(grad, *kept, *of, None, False, None) == (None, None, None)
    leaves = [x.requires_grad_(), w.requires_grad_(), bias.requires_grad_()]
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        found.forward(*leaves, *found.arguments).backward(grad)
    for leaf, wanted in zip(leaves, backward(grad, *kept, *of, torch.float32, True, torch.float32), strict=True):
        same(leaf.grad, wanted)
    with torch.no_grad():
        same(found.forward(x.to(dtype), w, bias, *found.arguments), y)


def kept_parts(kept_x, kept_w, x_q, codes, scale):
    """What bytes hold, each part 16-byte aligned: codes of x and their two scales; codes of w in 2 bits and its scales."""
    aligned = lambda count: -(-count // 16) * 16  # noqa: E731
    m, k = x_q.numel() // x_q.shape[-1], x_q.shape[-1]
    x_scale = kept_x[aligned(m * k) + aligned(4 * m) :][: 4 * m].view(torch.float32)
    w_scale = kept_w[aligned(codes.numel()) :][: 4 * scale.numel()].view(torch.float32)
    return (
        kept_x[: m * k].view(torch.int8).view(x_q.shape),
        x_scale.view(*x_q.shape[:-1], 1),
        kept_w[: codes.numel()].view(codes.shape),
        w_scale.view(scale.shape),
    )


def elsewhere(kept):
    """As a hook of saved tensors may bring them back: parts of a larger tensor."""
    return [torch.cat([one.new_zeros(16), one])[16:] for one in kept]


def test_what_is_kept_is_two_tensors(place):
    """Of bytes, each an allocation: what nodes of other layers hold is what they need."""
    w = torch.randn(21, 36, device=place[0], requires_grad=True)
    found, saved = fused.ops_for(QuantConfig(), w.detach()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        found.forward(torch.randn(7, 36, device=place[0]), w, None, *found.arguments).sum().backward()
    assert [(one.dtype, one.numel()) for one in saved] == [(torch.uint8, 256 + 32 + 32), (torch.uint8, 192 + 16)]


@pytest.mark.parametrize("wrong", ["float64", "integers", "narrow", "empty", "scalar", "weight", "rows", "bias", "wide bias"])
def test_what_it_does_not_serve_it_leaves(place, wrong):
    device, _ = place
    x, w, bias = torch.randn(7, 36, device=device), torch.randn(21, 36, device=device), torch.randn(21, device=device)
    found = fused.ops_for(QuantConfig(), w)
    inputs = {
        "float64": (x.double(), w, bias),
        "integers": (x.int(), w, bias),
        "narrow": (x[:, 1:], w, bias),
        "empty": (x[:0], w, bias),
        "scalar": (x[0, 0], w, bias),
        "weight": (x, w.bfloat16(), bias),
        "rows": (x, w.t().contiguous().t(), bias),
        "bias": (x, w, bias.int()),
        "wide bias": (x, w, bias[1:]),
    }
    assert found.forward(*inputs[wrong], *found.arguments) is None
    assert found.forward(x, w, bias, *found.arguments) is not None


@pytest.mark.parametrize(
    "config", [{"scale": "absmedian"}, {"scale_multiplier": 1.5}, {"backward": "int8"}, {"weight": "twn"}], ids=str
)
def test_what_it_does_not_know_is_left_to_the_ops(place, config):
    assert fused.ops_for(QuantConfig(**config), torch.randn(21, 36, device=place[0])) is None
