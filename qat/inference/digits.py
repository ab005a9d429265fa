"""The output head in 6 or 8 bits: each weight as several ternary digits, so that the ternary kernels run it.

No recipe quantizes the head, which in a small model outweighs all the rest at one token. Its digits change the logits: `python
-m qat.evaluate --head` says by how much. Rejected: torch's own weight-only kernels for the head: on a Zen 4 CPU
`_weight_int8pack_mm` took longer than the float32 matrix in float32, and in bfloat16 as long as the bfloat16 one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.config import QuantConfig
from qat.inference.heads import stream_head
from qat.inference.tiles import LinearLike, TiledLinear, tileable
from qat.nn.packed import PackedBitLinear
from qat.ops import pack_ternary
from qat.quantizers.components import repeat


class DigitLinear(LinearLike):
    """A linear layer whose weights are `digits` balanced ternary digits, so that the ternary kernels run it.

    w ~ step * sum_p 3^p t_p with t_p in {-1, 0, 1}: the integers from -(3^digits - 1) / 2 to +(3^digits - 1) / 2, one step a row.
    The digits lie side by side along K as groups with the scales 3^p * step, and the input, in int8 as everywhere, is repeated.
    4 digits have 81 levels in 6.4 bits a weight, 5 have 243 in 8 (base-3 layout). x [..., K] -> [..., N].
    """

    def __init__(self, linear: nn.Linear, digits: int) -> None:
        super().__init__()
        n, k = linear.weight.shape
        config = QuantConfig(granularity="group", group_size=k)
        layer = PackedBitLinear(digits * k, n, False, config, "base3", device="meta")
        with torch.no_grad():
            layer.packed, layer.weight_scale = torch.empty_like(layer.packed, device="cpu"), torch.empty(n, digits)
            for first in range(0, n, _CHUNK):
                rows = slice(first, first + _CHUNK)
                layer.packed[rows], layer.weight_scale[rows] = _packed_digits(linear.weight[rows].float(), digits)
            layer.bias = None if linear.bias is None else linear.bias.detach().clone()
        self.digits, self.in_features, self.out_features, self.name = digits, k, n, "the output head"
        self.dtype = linear.weight.dtype
        self.linear = TiledLinear([layer]) if tileable(layer) else layer

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(repeat(x, self.digits))


_CHUNK = 256  # rows at once: a large vocabulary's digits would take gigabytes


def _packed_digits(weight: Tensor, digits: int) -> tuple[Tensor, Tensor]:
    codes, scale = ternary_digits(weight, digits)
    return pack_ternary(codes, "base3"), scale


def ternary_digits(weight: Tensor, digits: int) -> tuple[Tensor, Tensor]:
    """int8 digits [N, digits * K], least significant first, and their scales float32 [N, digits] of a matrix [N, K]."""
    step = (weight.abs().amax(1, keepdim=True) / (3**digits // 2)).clamp_min(torch.finfo(torch.float32).tiny)
    rest, planes = (weight / step).round().to(torch.int32), []
    for _ in range(digits):
        plane = (rest + 1).remainder(3) - 1
        planes.append(plane.to(torch.int8))
        rest = (rest - plane) // 3
    return torch.cat(planes, 1), step * 3.0 ** torch.arange(digits)


HEAD_DIGITS = {"6bit": 4, "8bit": 5}
"""Name -> ternary digits a weight."""


def quantize_head(model: Any, kind: str) -> None:
    """Replace the output head of a transformers model by a smaller one, in place. A tied embedding keeps its values.

    Raises:
        ValueError: unknown kind, a model without a linear head, or bf16 without compiled CPU kernels.
    """
    if kind != "bf16" and kind not in HEAD_DIGITS:
        raise ValueError(f"--head {kind} is not known; choose one of full, bf16, {', '.join(HEAD_DIGITS)}")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear output head to be stored in {kind}")
    if kind == "bf16":
        stream_head(model, half=True)
        if model.get_output_embeddings() is head:
            raise ValueError("--head bf16 needs the compiled CPU kernels and a float32 model; choose --head full")
        return
    model.set_output_embeddings(DigitLinear(head, HEAD_DIGITS[kind]))
