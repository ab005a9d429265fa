"""Make a packed model fast at one token: fewer calls, and a head that does not outweigh all the rest.

A linear layer of a small model takes microseconds, so what surrounds the arithmetic matters:

* packed layers become `TiledLinear`: the tiles that the compiled kernel reads, and nothing else to check or look up;
* projections that share an input (q, k, v; gate, up) become one: rows of codes are concatenated, scales are given per row, the
  input is quantized once. Every row keeps its own codes and scale, so the numbers stay the same to the bit;
* the output head, which no recipe quantizes, may be stored in 6 or 8 bits, as several ternary digits a weight, so that the same
  kernels run it. That changes the logits: `python -m qat.evaluate --head` says by how much.

Rejected: rewriting attention and MLP modules to call the fused layer, as they differ from architecture to architecture; a
`Leader` that computes all and `Follower`s that hand out their parts need no change in them. torch's own weight-only kernels for
the head: on a Zen 4 CPU `_weight_int8pack_mm` took longer than the float32 matrix in float32, and in bfloat16 as long as the
bfloat16 one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.config import QuantConfig
from qat.inference.heads import stream_head
from qat.nn.packed import PackedBitLinear
from qat.ops import cpu, pack_ternary
from qat.quantizers.components import repeat

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that read the same tensor, in the order in which they are called."""


class TiledLinear(nn.Module):
    """PackedBitLinear layers [N_i, K] as one [sum N_i, K] on the compiled CPU kernels, for inference: it has no gradient.

    x [..., K] -> [..., sum N_i] in x's dtype, the layers' outputs side by side, equal to the bit.
    """

    tiles: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layers: Sequence[PackedBitLinear]) -> None:
        super().__init__()
        first = layers[0]
        assert len(layers) == 1 or all(fits_with(first, layer) for layer in layers)
        packed, scale = first.packed, first.weight_scale
        if len(layers) > 1:
            packed = torch.cat([layer.packed for layer in layers])
            scale = torch.cat([layer.weight_scale.expand(layer.out_features, -1) for layer in layers])
        tiles, scale, base3 = cpu.packed_tiles(packed, scale, first.width, first.layout)
        self.register_buffer("tiles", tiles)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", _joined_bias(layers))
        self.in_features, self.out_features = first.in_features, packed.shape[0]
        self.sizes = (self.out_features, first.width, first.weight_scale.shape[1], base3)
        self.per_tensor, self.eps = first.config.act_granularity == "tensor", first.config.eps
        self.rms_norm, self.components = first.rms_norm, first.config.components

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.rms_norm is not None:
            x = self.rms_norm(x)
        x = repeat(x, self.components)
        return torch.ops.qat.cpu_linear(x, self.tiles, self.scale, self.bias, *self.sizes, self.per_tensor, self.eps)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _joined_bias(layers: Sequence[PackedBitLinear]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float() for layer in layers])


def fits_with(first: PackedBitLinear, other: PackedBitLinear) -> bool:
    """Whether two layers quantize an input alike and may become one: not where each norms it by weights of its own."""
    if first.rms_norm is not None:
        return False
    return (first.in_features, first.layout, first.config) == (other.in_features, other.layout, other.config)


class Leader(nn.Module):
    """The first of several projections of one input: computes all of them, keeps what the followers will be asked for."""

    def __init__(self, layers: Sequence[PackedBitLinear]) -> None:
        super().__init__()
        self.linear = TiledLinear(layers)
        self.sizes = [layer.out_features for layer in layers]
        self.input: Tensor | None = None
        self.outputs: tuple[Tensor | None, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> the first layer's [..., N_0]."""
        first, *rest = self.linear(x).split(self.sizes, -1)
        self.input, self.outputs = x, tuple(rest)
        return first


class Follower(nn.Module):
    """A projection that its leader has computed already. RuntimeError if it is called on another input, or first."""

    def __init__(self, leader: Leader, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "leader", leader)  # not a child: it is one already, elsewhere
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """The input that the leader saw -> this layer's [..., N_i]."""
        leader: Leader = self.leader  # type: ignore[assignment]
        if x is not leader.input:
            raise RuntimeError("fused projections were called on different inputs; run this model unfused")
        output = leader.outputs[self.index]
        assert output is not None
        if self.index == len(leader.outputs) - 1:
            leader.input, leader.outputs = None, ()
        return output


def tile(model: nn.Module) -> int:
    """Replace PackedBitLinear layers by TiledLinear, in place, fused where they share an input; how many it replaced.

    0 where the compiled CPU kernels do not serve: the layers stay as they are, and run in pure torch.
    """
    count = 0
    for parent in list(model.modules()):
        for names in SHARED_INPUT:
            layers = [getattr(parent, name, None) for name in names]
            if all(_tileable(layer) for layer in layers) and all(fits_with(layers[0], layer) for layer in layers):  # type: ignore[arg-type]
                leader = Leader(layers)  # type: ignore[arg-type]
                setattr(parent, names[0], leader)
                for index, name in enumerate(names[1:]):
                    setattr(parent, name, Follower(leader, index))
                count += len(names)
        for name, child in list(parent.named_children()):
            if _tileable(child):
                setattr(parent, name, TiledLinear([child]))  # type: ignore[list-item]
                count += 1
    return count


def _tileable(layer: Any) -> bool:
    return (
        isinstance(layer, PackedBitLinear)
        and layer.packed.is_cpu
        and layer.config.kernels != "reference"
        and layer.config.act_bits is not None
        and layer.width <= cpu.MAX_WIDTH
        and cpu.compiled()
    )


class DigitLinear(nn.Module):
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
        self.digits = digits
        self.linear = TiledLinear([layer]) if _tileable(layer) else layer

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


HEADS = {"6bit": 4, "8bit": 5}
"""Name -> ternary digits a weight."""


def quantize_head(model: Any, kind: str) -> None:
    """Replace the output head of a transformers model by a smaller one, in place. A tied embedding keeps its values.

    Raises:
        ValueError: unknown kind, a model without a linear head, or bf16 without compiled CPU kernels.
    """
    if kind != "bf16" and kind not in HEADS:
        raise ValueError(f"--head {kind} is not known; choose one of full, bf16, {', '.join(HEADS)}")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear output head to be stored in {kind}")
    if kind == "bf16":
        stream_head(model, half=True)
        if model.get_output_embeddings() is head:
            raise ValueError("--head bf16 needs the compiled CPU kernels and a float32 model; choose --head full")
        return
    model.set_output_embeddings(DigitLinear(head, HEADS[kind]))
