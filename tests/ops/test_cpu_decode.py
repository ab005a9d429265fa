"""`qat::cpu_decode`, one token through all layers of a decoder, against the same steps in float64, on every instruction set.

Random layers of odd sizes without transformers, so that the sanitizers run them too; test_generate.py has real architectures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from qat import ops
from qat.ops import cpu

if not cpu.compiled():
    pytest.skip(f"no compiled kernels: {cpu.status().why}", allow_module_level=True)

EPS, NORM_EPS = 1e-5, 1e-6


@dataclass(frozen=True)
class Shape:
    """A decoder; `groups` along K of every projection, `rotary` elements of a head that are turned."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    width: int
    rotary: int
    layers: int = 2
    room: int = 5
    layout: str = "2bit"
    groups: int = 1
    extras: bool = False  # biases, and norms of the q and k heads


SHAPES = {
    "odd widths": Shape(hidden=37, mlp=45, heads=3, kv_heads=1, width=10, rotary=10),
    "base3": Shape(hidden=163, mlp=81, heads=2, kv_heads=2, width=22, rotary=22, layout="base3"),
    "groups": Shape(hidden=48, mlp=36, heads=6, kv_heads=3, width=18, rotary=8, groups=3),
    "groups in base3": Shape(hidden=320, mlp=160, heads=5, kv_heads=5, width=32, rotary=32, layout="base3", groups=2),
    "biases and head norms": Shape(hidden=64, mlp=80, heads=4, kv_heads=2, width=24, rotary=12, extras=True),
    "work for two threads": Shape(hidden=1040, mlp=1536, heads=16, kv_heads=4, width=64, rotary=64, layers=1, room=70),
}


class Projection:
    """A packed linear [N, K]: what the kernel reads, and the reference."""

    def __init__(self, n: int, k: int, shape: Shape) -> None:
        self.k, self.layout = k, shape.layout
        self.packed = ops.pack_ternary(torch.randint(-1, 2, (n, k), dtype=torch.int8), shape.layout)
        self.scale = torch.rand(n if shape.extras or shape.groups > 1 else 1, shape.groups) / k**0.5 + 0.01
        self.bias = torch.randn(n) if shape.extras else None
        self.tiles, self.tile_scale, base3 = cpu.packed_tiles(self.packed, self.scale, k, shape.layout)
        self.sizes = [n, k, shape.groups, int(base3)]
        self.tensors = [self.tiles, self.tile_scale, torch.empty(0) if self.bias is None else self.bias]

    def __call__(self, x: Tensor) -> Tensor:
        options = {"in_features": self.k, "layout": self.layout, "eps": EPS, "kernels": "reference"}
        return ops.packed_linear(x.float(), self.packed, self.scale, self.bias, **options).double()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt() * weight.double() if weight.numel() else x


class Layer:
    """Attention and MLP, each after a norm."""

    def __init__(self, s: Shape) -> None:
        self.norms = torch.rand(2, s.hidden) + 0.5
        self.qkv = Projection((s.heads + 2 * s.kv_heads) * s.width, s.hidden, s)
        self.o = Projection(s.hidden, s.heads * s.width, s)
        self.gate_up = Projection(2 * s.mlp, s.hidden, s)
        self.down = Projection(s.hidden, s.mlp, s)
        self.head_norms = torch.rand(2, s.width) + 0.5 if s.extras else torch.empty(2, 0)

    def weights(self) -> list[Tensor]:
        attention = [self.norms[0], *self.qkv.tensors, *self.o.tensors]
        return [*attention, self.norms[1], *self.gate_up.tensors, *self.down.tensors, *self.head_norms]

    def sizes(self) -> list[int]:
        return [size for linear in (self.qkv, self.o, self.gate_up, self.down) for size in linear.sizes]

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, position: int, s: Shape) -> Tensor:
        """x [1, H]; the keys and values [KV heads, room, D] of `position` are written."""
        q, k, v = self.qkv(x).reshape(-1, s.width).split([s.heads, s.kv_heads, s.kv_heads])
        q, k = (turned(rms_norm(part, norm), cos, sin) for part, norm in zip((q, k), self.head_norms, strict=True))
        keys[:, position], values[:, position] = k, v
        k, v = (part[:, : position + 1].double().repeat_interleave(s.heads // s.kv_heads, 0) for part in (keys, values))
        weights = (torch.einsum("hd,htd->ht", q, k) * s.width**-0.5).softmax(-1)
        return self.o(torch.einsum("ht,htd->hd", weights, v).reshape(1, -1))

    def __call__(self, x: Tensor, *attention: object) -> Tensor:
        x = x + self.attend(rms_norm(x, self.norms[0]), *attention)  # type: ignore[arg-type]
        gate, up = self.gate_up(rms_norm(x, self.norms[1])).chunk(2, -1)
        return x + self.down(silu(gate) * up)


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads [H, D] in halves of the first elements."""
    first, rest = heads.split([cos.numel(), heads.shape[1] - cos.numel()], -1)
    left, right = first.chunk(2, -1)
    return torch.cat([first * cos.double() + torch.cat([-right, left], -1) * sin.double(), rest], -1)


class Call:
    """Random layers, a token, and what came before it."""

    def __init__(self, s: Shape, position: int) -> None:
        self.shape, self.position = s, position
        self.layers = [Layer(s) for _ in range(s.layers)]
        self.x, angles = torch.randn(1, s.hidden), torch.rand(s.rotary) * 6
        self.cos, self.sin = angles.cos(), angles.sin()
        self.keys, self.values = torch.randn(2, s.layers, s.kv_heads, s.room, s.width)
        self.weights = [weight for layer in self.layers for weight in layer.weights()]
        self.sizes = [size for layer in self.layers for size in layer.sizes()]

    def decode(self, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(y, keys, values) of the kernel."""
        keys, values = self.keys.clone(), self.values.clone()
        arguments = {
            "x": self.x,
            "weights": self.weights,
            "sizes": self.sizes,
            "keys": keys,
            "values": values,
            "cos": self.cos,
            "sin": self.sin,
            "position": self.position,
            "heads": self.shape.heads,
        }
        scaling = self.shape.width**-0.5
        return torch.ops.qat.cpu_decode(*{**arguments, **changes}.values(), NORM_EPS, EPS, scaling), keys, values

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same in float64 around the reference's linears."""
        x, keys, values = self.x.double(), self.keys.clone(), self.values.clone()
        for i, layer in enumerate(self.layers):
            x = layer(x, keys[i], values[i], self.cos, self.sin, self.position, self.shape)
        return x.float(), keys, values


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_path_computes_the_reference(shape: Shape, threads: int) -> None:
    before = cpu.isa(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for position in (0, 1, shape.room - 1):
            first = None
            for path in cpu.paths():
                cpu.select_isa(path)
                torch.manual_seed(position)
                call = Call(shape, position)
                found = call.decode()
                for mine, wanted in zip(found, call.expected(), strict=True):
                    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
                assert first is None or all(map(torch.equal, found, first)), f"{path} differs from {cpu.paths()[0]}"
                first = first or found
    finally:
        cpu.select_isa(before[0])
        torch.set_num_threads(before[1])


def change(values: list[object], index: int, value: object) -> list[object]:
    return [*values[:index], value, *values[index + 1 :]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda c: {"x": c.x[:, :-1]}, "projections do not fit each other"),
        (lambda c: {"x": c.x.double()}, "x must be contiguous float32 of 37 elements"),
        (lambda c: {"weights": c.weights[:-1]}, "wrong number of weights"),
        (lambda c: {"weights": change(c.weights, 0, torch.ones(36))}, "norm must be contiguous float32 of 37 elements"),
        (lambda c: {"weights": change(c.weights, 1, c.weights[1][:-1])}, r"tiles do not fit \[50, 37\]"),
        (lambda c: {"weights": change(c.weights, 1, c.weights[1].float())}, r"tiles do not fit \[50, 37\]"),
        (lambda c: {"weights": change(c.weights, 2, torch.ones(3))}, "scale must be contiguous float32 of 50 elements"),
        (lambda c: {"weights": change(c.weights, 3, torch.ones(3))}, "bias must be contiguous float32 of 50 elements"),
        (lambda c: {"weights": change(c.weights, 14, torch.ones(9))}, "head norm must be contiguous float32 of 10 elements"),
        (lambda c: {"sizes": c.sizes[:-1]}, "wrong number of weights"),
        (lambda c: {"sizes": change(c.sizes, 2, 0)}, "unsupported K = 37 in 0 groups"),
        (lambda c: {"sizes": change(c.sizes, 13, 44)}, "projections do not fit each other"),
        (lambda c: {"position": 5}, "wrong position, heads or rotary width"),
        (lambda c: {"position": -1}, "wrong position, heads or rotary width"),
        (lambda c: {"keys": c.keys[:, :0], "values": c.values[:, :0]}, "wrong position, heads or rotary width"),
        (lambda c: {"cos": torch.ones(12), "sin": torch.ones(12)}, "wrong position, heads or rotary width"),
        (lambda c: {"sin": c.sin[:-1]}, "sin must be contiguous float32 of 10 elements"),
        (lambda c: {"values": c.values[:, :, :-1]}, "values must be contiguous float32 of 100 elements"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_read(changes: Callable[[Call], dict[str, Any]], message: str) -> None:
    call = Call(SHAPES["odd widths"], 4)
    with pytest.raises(RuntimeError, match=message):
        call.decode(**changes(call))
