"""Make a packed model fast at one token: fewer calls.

A linear layer of a small model takes microseconds, so what surrounds the arithmetic matters:

* packed layers become `TiledLinear`: the tiles that the compiled kernel reads, and nothing else to check or look up;
* projections that share an input (q, k, v; gate, up) become one: rows of codes are concatenated, scales are given per row, the
  input is quantized once. Every row keeps its own codes and scale, so the numbers stay the same to the bit;

Rejected: rewriting attention and MLP modules to call the fused layer, as they differ from architecture to architecture; a
`Leader` that computes all and `Follower`s that hand out its parts need no change in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.nn.packed import PackedBitLinear
from qat.nn.withheld import WithheldWeight
from qat.ops import cpu
from qat.quantizers.components import repeat

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that usually read the same tensor; where they do not, each call computes anew."""


class LinearLike(nn.Module):
    """What a model may ask of an nn.Linear, of a layer that took its place: a weight without values, and its size."""

    in_features: int
    out_features: int
    dtype: torch.dtype
    name: str

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device; reading values raises ValueError."""
        return WithheldWeight((self.out_features, self.in_features), self.dtype, torch.device("cpu"), self.name)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class TiledLinear(LinearLike):
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
        self.rms_norm, self.components = first.rms_norm, first.config.planes
        self.dtype, self.name = first.dtype, first.name

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        x = input if self.rms_norm is None else self.rms_norm(input)
        x = repeat(x, self.components)
        return torch.ops.qat.cpu_linear(x, self.tiles, self.scale, self.bias, *self.sizes, self.per_tensor, self.eps)


def _joined_bias(layers: Sequence[PackedBitLinear]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float() for layer in layers])


def fits_with(first: PackedBitLinear, other: PackedBitLinear) -> bool:
    """Whether two layers quantize an input alike and may become one: not where each norms it by weights of its own."""
    if first.rms_norm is not None:
        return False
    return (first.in_features, first.layout, first.config) == (other.in_features, other.layout, other.config)


class Leader(LinearLike):
    """The first of several projections, usually of one input: whichever is called first has all of them computed.

    What the others will be asked for is kept for as long as they are asked with the same tensor, in any order. A call with
    another tensor, or with one that was written to, computes anew.
    """

    def __init__(self, layers: Sequence[PackedBitLinear]) -> None:
        super().__init__()
        self.linear = TiledLinear(layers)
        self.sizes = [layer.out_features for layer in layers]
        self.in_features, self.out_features = self.linear.in_features, self.sizes[0]
        self.dtype, self.name = layers[0].dtype, layers[0].name
        self.input: Tensor | None = None
        self.version: int | None = None
        self.outputs: list[Tensor | None] = []

    @property
    def bias(self) -> Tensor | None:
        return self.bias_of(0)

    def bias_of(self, index: int) -> Tensor | None:
        """Float32 [N_index] of one of the layers, or None."""
        return None if self.linear.bias is None else self.linear.bias.split(self.sizes)[index]

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> the first layer's [..., N_0]."""
        return self.part(0, input)

    def part(self, index: int, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N_index]."""
        version = None if x.is_inference() else x._version
        if x is not self.input or version != self.version or self.outputs[index] is None:
            self.input, self.version, self.outputs = x, version, list(self.linear(x).split(self.sizes, -1))
        output, self.outputs[index] = self.outputs[index], None
        if all(rest is None for rest in self.outputs):
            self.input = None
        assert output is not None
        return output


class Follower(LinearLike):
    """One of the projections that a leader computes."""

    def __init__(self, leader: Leader, index: int, layer: PackedBitLinear) -> None:
        super().__init__()
        object.__setattr__(self, "leader", leader)  # not a child: it is one already, elsewhere
        self.index = index
        self.in_features, self.out_features, self.dtype, self.name = (
            layer.in_features,
            layer.out_features,
            layer.dtype,
            layer.name,
        )

    @property
    def bias(self) -> Tensor | None:
        return self.leader.bias_of(self.index)  # type: ignore[operator, union-attr]

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> this layer's [..., N_i]."""
        leader: Leader = self.leader  # type: ignore[assignment]
        return leader.part(self.index, input)


Undo = list[tuple[nn.Module, str, nn.Module]]


def tile(model: nn.Module, *, fuse: bool = True, undo: Undo | None = None) -> int:
    """Replace PackedBitLinear layers by TiledLinear, in place, fused where they share an input; how many it replaced.

    0 where the compiled CPU kernels do not serve: the layers stay as they are, and run in pure torch. What was replaced is
    appended to `undo`. Use `tile_checked` for a model that can be run: it takes back what changes a number.
    """
    replaced: Undo = [] if undo is None else undo
    before = len(replaced)
    for parent in list(model.modules()):
        for names in SHARED_INPUT if fuse else ():
            layers = [getattr(parent, name, None) for name in names]
            if all(tileable(layer) for layer in layers) and all(fits_with(layers[0], layer) for layer in layers):  # type: ignore[arg-type]
                leader = Leader(layers)  # type: ignore[arg-type]
                _replace(parent, names[0], leader, replaced)
                for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
                    if index:
                        _replace(parent, name, Follower(leader, index, layer), replaced)  # type: ignore[arg-type]
        for name, child in list(parent.named_children()):
            if tileable(child):
                _replace(parent, name, TiledLinear([child]), replaced)  # type: ignore[list-item]
    return len(replaced) - before


def _replace(parent: nn.Module, name: str, new: nn.Module, undo: Undo) -> None:
    undo.append((parent, name, getattr(parent, name)))
    setattr(parent, name, new)


@torch.inference_mode()
def tile_checked(model: Any, tokens: int = 4) -> str:
    """`tile`, tried once against the model as it was, to the bit; what was done, in words, "" for nothing.

    Where fused projections give other logits or fail, as in a model that changes their input between them, each layer is tiled
    alone; where that fails, too, all stay as they are.
    """
    ids = torch.arange(tokens)[None] % model.get_input_embeddings().weight.shape[0]
    before = model(input_ids=ids).logits
    reasons: list[str] = []
    for fuse, words in ((True, "tiled, some as one"), (False, "tiled, each alone")):
        undo: Undo = []
        count = tile(model, fuse=fuse, undo=undo)
        why = _difference(model, ids, before)
        if why is None:
            return f"{count} packed layers {words}{''.join(reasons)}" if count else ""
        reasons = [f" ({why})"]
        for parent, name, old in reversed(undo):
            setattr(parent, name, old)
    return f"packed layers as they are{''.join(reasons)}"


def _difference(model: Any, ids: Tensor, before: Tensor) -> str | None:
    try:
        return None if torch.equal(model(input_ids=ids).logits, before) else "this model fused gives other logits"
    except Exception as error:  # whatever the model raises
        return f"this model does not run fused: {str(error).partition(chr(10))[0]}"


def tileable(layer: Any) -> bool:
    return (
        isinstance(layer, PackedBitLinear)
        and layer.packed.is_cpu
        and layer.config.kernels != "reference"
        and layer.config.act_bits == 8
        and not layer.config.act_hadamard
        and layer.width <= cpu.MAX_WIDTH
        and cpu.compiled()
    )
