"""Codes in 2 bits each: what a layer keeps of its weight between its passes, and that no gradient notices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_checks import DTYPES, codes, same
from torch import Tensor

import qat
from qat import QuantConfig
from qat.ops import cpu
from qat.ops.bits import kept
from qat.quantizers import QUANTIZERS, packing
from qat.quantizers.record import Quantizer

if not cpu.compiled():
    pytest.skip(f"no compiled kernels: {cpu.status().why}", allow_module_level=True)

SHAPES = [(1, 1), (3, 5), (5, 64), (7, 1023), (2, 1024), (3, 2050), (0, 8), (4, 0)]
CONFIGS: dict[str, QuantConfig] = {
    **{name: QuantConfig(weight=name, granularity="channel", components=max(row.planes[0], 1) if not row.ratios else 1)
       for name, row in QUANTIZERS.items()},
    "bf16": QuantConfig(backward="bf16"),
    "int8": QuantConfig(backward="int8"),
    "bf16 channel": QuantConfig(backward="bf16", granularity="channel"),
    "group": QuantConfig(granularity="group", group_size=12),
    "three components": QuantConfig(components=3),
    "learned components": QuantConfig(components=2, component_scales="learned"),
    "4-bit inputs": QuantConfig(act_bits=4),
    "float inputs": QuantConfig(act_bits=None),
    "pure torch": QuantConfig(kernels="reference"),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_the_layout_2bit(shape: tuple[int, int], isa: str, threads: int) -> None:
    t, k = codes(*shape), shape[1]
    wanted = packing.pack_ternary(t, "2bit")
    for twin in ("", "_reference"):
        bits = getattr(torch.ops.qat, f"pack_bits{twin}")(t)
        same(bits, wanted)
        same(getattr(torch.ops.qat, f"unpack_bits{twin}")(bits, k), t)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_floats_of_bits(dtype: torch.dtype, isa: str, threads: int) -> None:
    for n, k, shape in ((3, 1500, (1, 1)), (5, 42, (5, 1)), (4, 2070, (4, 3)), (4, 60, (1, 3)), (0, 8, (1, 1)), (1, 1, (1, 1))):
        t, scale = codes(n, k), torch.rand(shape) + 0.01
        wanted = torch.ops.qat.dequantize_reference(t, scale, dtype)
        bits = packing.pack_ternary(t, "2bit")
        for twin in ("", "_reference"):
            same(getattr(torch.ops.qat, f"dequantize_bits{twin}")(bits, k, scale, dtype), wanted)


def test_opcheck() -> None:
    t = codes(6, 21)
    torch.library.opcheck(torch.ops.qat.pack_bits.default, (t,))
    torch.library.opcheck(torch.ops.qat.unpack_bits.default, (packing.encode(t), 21))
    torch.library.opcheck(torch.ops.qat.dequantize_bits.default, (packing.encode(t), 21, torch.rand(6, 3), torch.bfloat16))


def layer_of(config: QuantConfig) -> qat.BitLinear:
    torch.manual_seed(0)
    return qat.BitLinear(36, 24, config=config)


def step(layer: qat.BitLinear) -> tuple[list[Tensor], list[Tensor]]:
    """All gradients of a step, and what it saved for them."""
    saved: list[Tensor] = []
    x = torch.randn(5, 36, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def see(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    cpu.clear_caches()
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        y = layer(x)
    y.backward(torch.randn(5, 24, generator=torch.Generator().manual_seed(2)))
    return [x.grad, *(one.grad for one in layer.parameters())], saved  # type: ignore[list-item]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_layer_keeps_two_bits_a_code_and_no_gradient_notices(config: QuantConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several components, and 3 or 4 bits as ternary digits, are as many planes of codes."""
    gradients, saved = step(layer_of(config))
    held = [one for one in saved if one.dtype == torch.uint8]
    assert [tuple(one.shape) for one in held] == [(24, 9 * config.planes)]
    assert not [one for one in saved if one.dtype == torch.int8 and one.shape[0] == 24]
    monkeypatch.setattr(kept, "in_bits", lambda record: False)
    wanted, saved = step(layer_of(config))
    assert [tuple(one.shape) for one in saved if one.dtype == torch.int8 and one.shape[0] == 24] == [(24, 36 * config.planes)]
    for ours, theirs in zip(gradients, wanted, strict=True):
        same(ours, theirs)


def test_codes_beyond_ternary_ones_are_kept_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    five: Quantizer = replace(
        QUANTIZERS["ternary"],
        levels=(-2, -1, 0, 1, 2),
        codes=lambda rows, scale, **_: (2 * rows / scale).round().clamp(-2, 2),
        packs_as=(),
        backwards=("input",),
    )
    monkeypatch.setitem(QUANTIZERS, "five", five)
    saved: list[Any] = step(layer_of(QuantConfig(weight="five")))[1]
    assert [tuple(one.shape) for one in saved if one.dtype == torch.int8 and one.shape[0] == 24] == [(24, 36)]
    assert not [one for one in saved if one.dtype == torch.uint8]


def test_a_warm_up_keeps_two_bits_too() -> None:
    layer = layer_of(QuantConfig(weight="ternary_clipped"))
    layer.set_lambda(0.5)
    assert [tuple(one.shape) for one in step(layer)[1] if one.dtype == torch.uint8] == [(24, 9)]
