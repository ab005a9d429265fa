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
    y, *kept = found.forward(x, w, bias, dtype, *found.arguments)
    for one, wanted in zip((y, *kept), op("bitlinear", x.to(dtype), w, bias, [], *training_options(config)), strict=True):
        same(one, wanted)
    x_q, x_scale, codes, scale = kept
    backward, bf16 = torch.ops.qat.cuda_fused_gradients.default, config.backward == "bf16"
    of_x, of_w, of_bias = backward(grad, *kept, k, bf16, torch.float32, True, torch.bfloat16)
    input_gradient, weight_gradient = gradients._MATMULS[config.backward]
    same(of_x, input_gradient(grad, Kept(codes, k), scale, 1).float())
    same(of_w, weight_gradient(grad, x_q, x_scale).float())
    same(of_bias, gradients.bias_gradient(grad).bfloat16())
    assert backward(grad, *kept, k, False, None, False, None) == (None, None, None)
    leaves = [x.requires_grad_(), w.requires_grad_(), bias.requires_grad_()]
    found.forward(*leaves, dtype, *found.arguments)[0].backward(grad)
    for leaf, wanted in zip(leaves, backward(grad, *kept, k, bf16, torch.float32, True, torch.float32), strict=True):
        same(leaf.grad, wanted)


@pytest.mark.parametrize(
    "config", [{"scale": "absmedian"}, {"scale_multiplier": 1.5}, {"backward": "int8"}, {"weight": "twn"}], ids=str
)
def test_what_it_does_not_know_is_left_to_the_ops(place, config):
    assert fused.ops_for(QuantConfig(**config), torch.randn(21, 36, device=place[0])) is None
