"""Codes of several planes by the compiled CPU kernel: the reference's to the bit, on every path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_checks import same
from torch import Tensor

from qat import QuantConfig, ops
from qat.ops import cpu
from qat.quantizers import components

if not cpu.compiled():
    pytest.skip(f"no compiled kernels: {cpu.status().why}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("isa")


def scales(rows: int, planes: int) -> Tensor:
    return torch.rand(rows, planes, generator=torch.Generator().manual_seed(planes)) / 20 + 1e-3


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_nearest_levels(planes: int, threads: int) -> None:
    for n, k, length in ((1, 1, 1), (3, 33, 33), (5, 64, 16), (7, 40, 280), (2, 1000, 1000)):
        rows = torch.randn(n * k // length, length) / 20
        borders, book = components.code_book(scales(len(rows), planes))
        rows[:, 0] = borders[:, 0]  # on a border: the level below
        wanted = components.nearest_codes(rows, borders, book).reshape(planes, n, k).transpose(0, 1).reshape(n, planes * k)
        same(torch.ops.qat.cpu_nearest(rows, borders, book.contiguous(), k), wanted)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("component_scales", ["fitted", "learned"])
def test_quantize_weight(granularity: str, component_scales: str) -> None:
    group = 16 if granularity == "group" else None
    config = QuantConfig(granularity=granularity, group_size=group, components=2, component_scales=component_scales)
    w = torch.randn(24, 48) / 20
    for ours, theirs in zip(
        ops.quantize_weight(w, config), ops.quantize_weight(w, replace(config, kernels="reference")), strict=True
    ):
        same(ours, theirs)
