"""A float matrix as two planes of int8 codes, and gradients in bfloat16: kernels give what torch takes several passes for."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import same

from qat.ops import cpu

if not cpu.compiled():
    pytest.skip(f"no compiled kernels: {cpu.status().why}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (40, 256), (5, 1000)])
def test_planes_of_a_matrix(shape: tuple[int, int], threads: int) -> None:
    w = torch.randn(shape) / 30
    w[-1] = 0
    high, coarse, low, fine = torch.ops.qat.cpu_planes(w)
    wanted, scale = torch.ops.qat.quantize_activation_reference(w, "token", 1e-30)
    rest = w - wanted * scale
    wanted_low, scale_low = torch.ops.qat.quantize_activation_reference(rest, "token", 1e-30)
    for ours, theirs in ((high, wanted), (coarse, scale), (low, wanted_low), (fine, scale_low)):
        same(ours, theirs)
    assert (high * coarse.double() + low * fine.double() - w).abs().max() <= w.abs().max() * 2**-15


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (40, 256)])
def test_joined_planes(shape: tuple[int, int], bias: bool, threads: int) -> None:
    m, n = shape
    high, low = (torch.randint(-(2**24), 2**24, shape, dtype=torch.int32) for _ in range(2))
    coarse, fine, scale, added = torch.rand(n, 1), torch.rand(n, 1) / 254, torch.rand(m, 1), torch.randn(n) if bias else None
    wanted = (high.float() * coarse.t() + low.float() * fine.t()) * scale
    same(torch.ops.qat.cpu_join_planes(high, low, coarse, fine, scale, added), wanted if added is None else wanted + added)


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 2500)])
def test_gradients_in_bfloat16(shape: tuple[int, int], threads: int) -> None:
    grad, scale = torch.randn(shape), torch.rand(shape[0], 1)
    plain, scaled = torch.ops.qat.cpu_scaled_bf16(grad, scale)
    same(plain, grad.bfloat16())
    same(scaled, (grad * scale).bfloat16())
