"""A layer over two ranks, each of which has a part of the weight: a study of what tensor parallelism would need, op by op.

Split by outputs (rows of the weight, "columns" in the literature) a rank's scales are its own rows' or groups': nothing is said
between ranks, and the outputs side by side are one process's to the bit. Split by inputs, two things must be common: the largest
magnitude of each token, 4 bytes, and the integer sums, which are added up before they are rescaled. BitNet's group quantization
(arXiv:2310.11453, section 2.3) keeps both apart, and is exact to itself: but each token then has a scale a part, which no packed
format holds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from devices.pair import Pair
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qat import ops
from qat.config import QuantConfig
from qat.ops.options import WeightOptions, weight_options
from qat.ops.reference import integer_linear
from qat.ops.shards.sums import local_sums, pooled
from qat.parallel import rank, size, sums
from qat.quantizers.ternary import codes

TOKENS, K, N, EPS = 32, 256, 384, 1e-5


def operands() -> tuple[Tensor, Tensor]:
    """Inputs [M, K] and a weight [N, K], of very different sizes, in which the two halves' largest inputs are not alike."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, K, generator=draw) * torch.randn(K, generator=draw).exp()
    return x, torch.randn(N, K, generator=draw) * torch.randn(N, 1, generator=draw).exp() / 30


def part(tensor: Tensor, dim: int) -> Tensor:
    return tensor.chunk(size(), dim)[rank()].contiguous()


def side_by_side(y: Tensor) -> Tensor:
    found = [torch.empty_like(y) for _ in range(size())]
    dist.all_gather(found, y.contiguous())
    return torch.cat(found, -1)


def added(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


class Talk(TorchDispatchMode):
    """Names of the collectives within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def by_outputs(quant: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether it is one process's, and what was said before the outputs were put side by side."""
    (x, w), config = operands(), QuantConfig(**quant)
    with Talk() as said:
        y = ops.bitlinear(x, part(w, 0), None, config)
    return torch.equal(side_by_side(y), ops.bitlinear(x, w, None, config)), said.names


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("quant", [
    {"granularity": "channel"},
    {"granularity": "group", "group_size": 32},
    {"granularity": "channel", "scale": "absmax"},
    {"granularity": "group", "group_size": 64, "components": 2},
])  # fmt: skip
def test_split_by_outputs_with_scales_of_rows_needs_no_exchange(pair: Pair, quant: dict[str, Any], kernels: str) -> None:
    assert pair(by_outputs, {**quant, "kernels": kernels}) == [(True, [])] * 2


def one_scale() -> tuple[bool, bool, bool]:
    """Split by outputs: shards' own scales are not the whole weight's, but pack as scales of rows; a sum makes them one."""
    (x, w), config = operands(), QuantConfig()
    mine, whole = part(w, 0), ops.bitlinear(x, w, None, config)
    own = side_by_side(ops.bitlinear(x, mine, None, config))
    t, scale = ops.quantize_weight(mine, config)
    packed = ops.packed_linear(x, ops.pack_ternary(t), scale.expand(len(t), 1).contiguous(), in_features=K)
    together = pooled(sums([local_sums(mine)])[0], w.numel(), WeightOptions(*weight_options(config))).scale
    x_q, divisor = shared_codes(x, [])
    common = integer_linear(x_q, divisor, codes(mine, together).to(torch.int8), together, None, x.dtype)
    return torch.equal(own, whole), torch.equal(side_by_side(packed), own), torch.equal(side_by_side(common), whole)


def test_split_by_outputs_with_a_scale_of_a_shard_is_another_quantizer(pair: Pair) -> None:
    assert pair(one_scale) == [(False, True, True)] * 2


def shared_codes(x: Tensor, exchanges: list[int], together: bool = True) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, k] of a rank's inputs and their divisor [M, 1], by the largest magnitude of the whole token."""
    most = x.abs().amax(-1, keepdim=True)
    if together:
        dist.all_reduce(most, dist.ReduceOp.MAX)
        exchanges.append(most.nbytes)
    divisor = 127 / most.clamp_min(EPS)
    return (x * divisor).round().clamp(-128, 127).to(torch.int8), divisor


def integer_sums(a: Tensor, b: Tensor) -> Tensor:
    """The product of the whole rows, from those of all ranks' parts."""
    return added(torch._int_mm(a, b.t().contiguous()))


def scale_of_rows(w: Tensor, granularity: str) -> Tensor:
    """The whole weight's [1 | N, 1] from its parts [N, K / W]: magnitudes added up in float64."""
    axis = {"tensor": (0, 1), "channel": (1,)}[granularity]
    total = sums([w.abs().sum(axis, dtype=torch.float64)])[0]
    count = K * (N if granularity == "tensor" else 1)
    return (total / count).float().clamp_min(EPS).reshape(-1, 1)


def by_inputs(granularity: str, multiply: str, dtype: torch.dtype = torch.float32) -> tuple[bool, float, int]:
    """Whether it is one process's, how far it is from that, and bytes a token that its maximum takes."""
    (x, w), exchanges = operands(), list[int]()
    mine = part(w, 1)
    scale = scale_of_rows(mine, granularity)
    x_q, divisor = shared_codes(part(x, 1), exchanges)
    t = codes(mine, scale).to(torch.int8)
    if multiply == "sums":
        y = integer_linear(x_q, divisor, t, scale, None, x.dtype, multiply=integer_sums)
    else:
        y = added(integer_linear(x_q, divisor, t, scale, None, x.dtype).to(dtype)).float()
    whole = ops.bitlinear(x, w, None, QuantConfig(granularity=granularity))
    return torch.equal(y, whole), float((y - whole).abs().max()), exchanges[0] // TOKENS


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_split_by_inputs_is_exact_with_a_common_maximum_and_sums_before_they_are_rescaled(pair: Pair, granularity: str) -> None:
    assert pair(by_inputs, granularity, "sums") == [(True, 0.0, 4)] * 2
    for exact, off, _ in pair(by_inputs, granularity, "outputs"):
        assert not exact and 0 < off < 1e-4  # the same sum, rounded before it is added up
    for exact, off, _ in pair(by_inputs, granularity, "outputs", torch.bfloat16):
        assert not exact and off > 1e-3


def blocks(x: Tensor, w: Tensor) -> list[Tensor]:
    """BitNet's groups on one process: the outputs of each half of the inputs, with a scale of weights and one of tokens each."""
    halves = zip(x.chunk(2, -1), w.chunk(2, -1), strict=True)
    return [ops.bitlinear(a.contiguous(), b.contiguous()) for a, b in halves]


def apart() -> tuple[bool, bool, bool]:
    """BitNet's group quantization: nothing common, outputs added up; and a token's scales, of which there are two."""
    x, w = operands()
    y = added(ops.bitlinear(part(x, 1), part(w, 1)))
    first, second = blocks(x, w)
    _, divisor = shared_codes(part(x, 1), [], together=False)
    everyone = side_by_side(divisor)
    return torch.equal(y, first + second), torch.equal(y, ops.bitlinear(x, w)), bool((everyone[:, 0] == everyone[:, 1]).all())


def test_scales_apart_are_exact_to_themselves_and_need_a_token_scale_for_each_part(pair: Pair) -> None:
    assert pair(apart) == [(True, False, False)] * 2


def without_a_common_maximum() -> tuple[bool, float]:
    (x, w), scale = operands(), scale_of_rows(part(operands()[1], 1), "tensor")
    x_q, divisor = shared_codes(part(x, 1), [], together=False)
    t = codes(part(w, 1), scale).to(torch.int8)
    y, whole = integer_linear(x_q, divisor, t, scale, None, x.dtype, multiply=integer_sums), ops.bitlinear(x, w)
    return torch.equal(y, whole), float((y - whole).abs().max())


def test_sums_of_codes_of_different_scales_are_no_sums(pair: Pair) -> None:
    for exact, off in pair(without_a_common_maximum):
        assert not exact and off > 1e-2
