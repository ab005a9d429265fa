"""The gradient of a float32 weight comes as float32 out of a matmul of 16-bit operands: on CUDA, where torch has one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_checks import EPS, same, tokens
from test_cuda import emulation as emulation
from test_cuda import place as place
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qat.config import QuantConfig
from qat.ops import gradients, reference
from qat.ops.fused import cuda as fused

HALVES = [torch.bfloat16, torch.float16]


class Called(TorchDispatchMode):
    """Notes the matmuls and casts."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(("aten.mm", "aten._to_copy")):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def called(device: str, dtype: torch.dtype, of: torch.dtype) -> tuple[list[str], torch.dtype]:
    with FakeTensorMode(), Called() as found:
        grad, x = (torch.empty(2, 5, width, device=device, dtype=dtype) for width in (7, 4))
        y = gradients.weight_gradient(grad, x, of)
    assert y.shape == (7, 4)
    return found.names, y.dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_what_decides(dtype: torch.dtype) -> None:
    """The device, the operands' dtype and the weight's; nothing is cast."""
    assert called("cuda", dtype, torch.float32) == (["aten.mm.dtype"], torch.float32)
    assert called("cuda", dtype, dtype) == called("cpu", dtype, torch.float32) == (["aten.mm.default"], dtype)
    assert called("cuda", torch.float32, torch.float32) == (["aten.mm.default"], torch.float32)


@pytest.fixture
def float_sums(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """A matmul that writes float32, for the CPU: the operands' dtypes of its calls. Emulated ops take it as a GPU's do."""
    monkeypatch.setenv("QAT_EMULATE_FLOAT_SUMS", "1")
    calls: list[torch.dtype] = []

    def multiply(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        calls.append(a.dtype)
        return a.to(out_dtype) @ b.to(out_dtype)

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", multiply, "CPU")
    yield calls
    library._destroy()


@pytest.mark.parametrize("backward", ["input", "bf16"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_the_op_of_a_training_linear(place, float_sums, backward: str, dtype: torch.dtype) -> None:
    """On a GPU too: float32 of the operands' float64 product, where a rounding to 16 bits would show."""
    device, _ = place
    config, n, k = QuantConfig(backward=backward), 21, 36
    x, w = tokens(10, k, dtype).to(device), torch.randn(n, k, device=device, requires_grad=True)
    grad = torch.randn(10, n, device=device).to(dtype)
    found = fused.ops_for(config, w)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        y = found.forward(x, w, None, *found.arguments)
    y.backward(grad)
    x_q, x_scale = (one.to(device) for one in reference.quantize_activation(x.cpu(), "token", EPS))
    if backward == "bf16":
        grad, values = (grad * x_scale).bfloat16(), x_q
    else:
        values = reference.dequantize(x_q, x_scale, dtype)
    assert w.grad is not None and w.grad.dtype == torch.float32
    wanted = grad.double().t() @ values.double()
    assert (w.grad - wanted).norm() / wanted.norm() < 1e-6
    if device.type == "cpu":
        assert float_sums == [torch.bfloat16 if backward == "bf16" else dtype] * (backward == "bf16" or dtype in HALVES)


def test_without_it_the_sums_are_rounded(place) -> None:
    """As before: the emulation's torch has no such matmul."""
    device, _ = place
    if device.type == "cuda":
        pytest.skip("a GPU's torch has one")
    x, w = tokens(10, 36, torch.bfloat16), torch.randn(21, 36, requires_grad=True)
    found = fused.ops_for(QuantConfig(), w)
    with torch.autocast("cpu", torch.bfloat16):
        y = found.forward(x, w, None, *found.arguments)
    y.backward(torch.randn(10, 21).bfloat16())
    assert w.grad is not None
    same(w.grad, w.grad.bfloat16().float())
