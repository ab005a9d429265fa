"""The attention kernels of narrow heads: torch's attention in float64, gradients too, and whom they leave to torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.ops import cpu
from qat.ops.attention import WIDTHS, causal_attention, serves

if not cpu.compiled() or not torch.ops.qat.cpu_attention_serves():
    pytest.skip("this CPU has no kernels for attention", allow_module_level=True)


def heads(batch: int, count: int, tokens: int, width: int, seed: int) -> Tensor:
    """As layers give them: [B, T, heads, D] in memory."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, count, width, generator=generator).transpose(1, 2)


def in_float64(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    """Output and gradients of q, k and v by torch."""
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=scale, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.double())]


def by_kernels(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = causal_attention(*inputs, scale)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("batch,count,kv,tokens", [(1, 4, 4, 16), (2, 6, 2, 80), (1, 2, 1, 208)])
def test_equals_float64(width, batch, count, kv, tokens, threads):
    q, grad = heads(batch, count, tokens, width, 0), heads(batch, count, tokens, width, 1)
    k, v = heads(batch, kv, tokens, width, 2), heads(batch, kv, tokens, width, 3)
    assert serves(q, k, v)
    for found, wanted in zip(by_kernels(q, k, v, grad, 0.4), in_float64(q, k, v, grad, 0.4), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=1e-5)


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v, grad = (heads(1, 2, 64, 8, seed) for seed in range(4))
    found, wanted = by_kernels(60 * q, k, v, grad, 1.0), in_float64(60 * q, k, v, grad, 1.0)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-3, atol=1e-4)
    assert all(bool(x.isfinite().all()) for x in found)


def test_no_token_sees_a_later_one():
    q, k, v = (heads(1, 2, 64, 16, seed) for seed in range(3))
    before = causal_attention(q, k, v, 0.25)
    k[:, :, 40:], v[:, :, 40:] = 100.0, -100.0
    assert torch.equal(causal_attention(q, k, v, 0.25)[:, :, :40], before[:, :, :40])


def test_nan_stays_nan():
    q, k, v = (heads(1, 1, 32, 8, seed) for seed in range(3))
    k[0, 0, 5, 3] = float("nan")
    out = causal_attention(q, k, v, 0.3)
    assert bool(out[:, :, 5:].isnan().all()) and bool(out[:, :, :5].isfinite().all())


def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    q, k, v, grad = (heads(2, 4, 128, 8, seed) for seed in range(4))
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(by_kernels(q, k, v, grad, 0.35))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_gradient_that_is_expanded():
    q, k, v = (heads(1, 2, 32, 8, seed) for seed in range(3))
    grad = torch.ones(()).expand(q.shape)
    for found, wanted in zip(by_kernels(q, k, v, grad, 0.4), in_float64(q, k, v, grad, 0.4), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape,kv,dtype",
    [
        ((1, 2, 20, 8), (1, 2, 20, 8), torch.float32),
        ((1, 2, 32, 64), (1, 2, 32, 64), torch.float32),
        ((1, 2, 32, 8), (1, 2, 64, 8), torch.float32),
        ((1, 3, 32, 8), (1, 2, 32, 8), torch.float32),
        ((1, 2, 32, 8), (1, 2, 32, 8), torch.bfloat16),
        ((0, 2, 32, 8), (0, 2, 32, 8), torch.float32),
    ],
    ids=["length", "width", "cache", "groups", "dtype", "empty"],
)
def test_left_to_torch(shape, kv, dtype):
    assert not serves(torch.zeros(shape, dtype=dtype), torch.zeros(kv, dtype=dtype), torch.zeros(kv, dtype=dtype))
