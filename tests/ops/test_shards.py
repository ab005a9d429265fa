"""Rows of a weight on one to eight devices: scales and codes of all together are the whole weight's, on every kernel.

The devices are played in turn: what each would send is put together as a gather does. tests/devices has real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import same, tokens
from torch import Tensor

from qat import QuantConfig, ops
from qat.ops import cpu, cuda
from qat.ops.bits import kernels as bits
from qat.ops.bits.kept import Kept
from qat.ops.options import weight_options
from qat.ops.shards.gathered import GatheredCodes
from qat.ops.shards.latent import Place, ShardedLatent
from qat.ops.shards.sums import local_sums
from qat.parallel.traffic import rows

WAYS: dict[str, dict[str, Any]] = {
    "tensor": {},
    "binary": {"weight": "binary"},
    "bfloat16, multiplied": {"scale_dtype": "bfloat16", "scale_multiplier": 1.3},
    "channel": {"granularity": "channel"},
    "binary channel": {"weight": "binary", "granularity": "channel"},
    "group": {"granularity": "group", "group_size": 9},
    "components": {"components": 2, "granularity": "group", "group_size": 9},
    "absmax": {"scale": "absmax", "granularity": "channel"},
}
SHAPES = [(13, 27), (192, 36), (3, 18), (1, 9)]
"""Rows that do not divide, more devices than rows, and widths that fill no whole bytes."""


def weight(n: int, k: int, seed: int) -> Tensor:
    """Of very different sizes, as rows of a trained matrix are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * torch.randn(n, 1, generator=generator).exp() / 30


def cut(w: Tensor, devices: int) -> list[Tensor]:
    """As FSDP2 cuts rows: equally many on each device, the last ones' fewer, or none."""
    each = rows(len(w), devices)
    return [w[each * i : each * (i + 1)].contiguous() for i in range(devices)]


def gathered(w: Tensor, config: QuantConfig, devices: int) -> GatheredCodes:
    """What every device has of the weight after a gather."""
    parts = [ShardedLatent.of(part, Place("layer", config, w.shape, devices)) for part in cut(w, devices)]
    if parts[0].place.pooled:
        for part in parts:
            part.place.mine = local_sums(part.detach())
        total = torch.stack([part.place.mine for part in parts]).sum(0)  # type: ignore[arg-type]
        for part in parts:
            part.place.take(total)
    sent = [part.fsdp_pre_all_gather(None) for part in parts]
    assert len({tuple(one.shape for one in each) for each, _ in sent}) == 1
    outputs = tuple(torch.cat(each) for each in zip(*[tensors for tensors, _ in sent], strict=True))
    found = parts[0].fsdp_post_all_gather(outputs, sent[0][1], w.dtype)
    assert found is not None and isinstance(found[0], GatheredCodes)
    return found[0]


def check(config: QuantConfig, quantize: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    for seed, (n, k) in enumerate(SHAPES):
        w = weight(n, k, seed)
        t, scale = quantize(w)
        for devices in range(1, 9):
            found = gathered(w, config, devices)
            same(found.scale, scale)
            same(Kept(found.codes, k * config.planes).alone(torch.int8), t)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernels", ["reference", "compiled"])
def test_shards_are_the_whole_weight(way: str, kernels: str) -> None:
    if kernels == "compiled" and not cpu.compiled():
        pytest.skip(f"no compiled kernels: {cpu.status().why}")
    config = QuantConfig(**WAYS[way], kernels=kernels)
    check(config, lambda w: ops.quantize_weight(w, config))


@pytest.fixture
def emulated(emulated_kernels: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ops that shards and whole weights call are CUDA's, with kernels that are compiled for the CPU."""
    from emulator import compiled_ops

    torch.ops.load_library(compiled_ops())
    monkeypatch.setattr(cuda, "_serves", lambda x, k=0: k <= cuda.MAX_WIDTH)
    table = {**cuda.KERNELS, **bits.CUDA}
    there = torch.ops.qat
    monkeypatch.setattr(torch.ops, "qat", Emulated(there, table), raising=False)
    yield


class Emulated(SimpleNamespace):
    """torch.ops.qat, but for ops that have CUDA kernels."""

    def __init__(self, there: Any, table: dict[str, Any]) -> None:
        self.there, self.table = there, table

    def __getattr__(self, name: str) -> Any:
        return self.table.get(name) or getattr(self.there, name)


@pytest.mark.parametrize("way", WAYS)
def test_shards_are_the_whole_weight_on_emulated_cuda(way: str, emulated: None) -> None:
    config = QuantConfig(**WAYS[way])
    check(config, lambda w: cuda.KERNELS["quantize_weight"](w, [], *weight_options(config)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backward", ["input", "bf16", "int8"])
def test_a_layer_of_gathered_codes_is_the_layer(way: str, backward: str) -> None:
    try:
        config = QuantConfig(**WAYS[way], backward=backward)
    except ValueError:
        pytest.skip("refused by QuantConfig")
    whole, x, bias = weight(13, 27, 5).requires_grad_(), tokens(6, 27).requires_grad_(), torch.randn(13).requires_grad_()
    codes = gathered(whole.detach(), config, 3).requires_grad_()
    found = []
    for w in (whole, codes):
        y = ops.bitlinear(x, w, bias, config)
        y.backward(torch.randn(6, 13, generator=torch.Generator().manual_seed(1)))
        with torch.no_grad():
            same(ops.bitlinear(x, w, bias, config), y)
        found.append([y, x.grad, w.grad, bias.grad])
        x.grad = bias.grad = None
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None
        same(ours, theirs)


def test_means_of_parts_alone_would_be_another_scale() -> None:
    """What the sums are for: averaging the devices' own means is wrong where the last has fewer rows."""
    w = weight(13, 27, 0)
    wanted = ops.quantize_weight(w)[1]
    assert torch.equal(gathered(w, QuantConfig(), 3).scale, wanted)
    means = torch.stack([part.double().abs().mean() for part in cut(w, 3)]).mean().float()
    assert not torch.equal(means.reshape(1, 1), wanted)


def test_weights_that_changed_are_noticed() -> None:
    part = ShardedLatent.of(weight(4, 8, 0), Place("layer", QuantConfig(), torch.Size((4, 8)), 1))
    with pytest.raises(RuntimeError, match="the scale of layer is not that of its weights now"):
        part.fsdp_pre_all_gather(None)
    part.place.mine = local_sums(part.detach())
    part.place.take(part.place.mine)
    part.fsdp_pre_all_gather(None)
    part.data.mul_(1.5)
    with pytest.raises(RuntimeError, match="the scale of layer is not that of its weights now"):
        part.fsdp_pre_all_gather(None)
    part.place.mine = local_sums(part.detach().fill_(float("nan")))
    part.place.take(part.place.mine)
    part.fsdp_pre_all_gather(None)  # those who look for NaN say it


def test_gathered_codes_have_no_floats() -> None:
    codes = gathered(weight(4, 8, 0), QuantConfig(), 2)
    with pytest.raises(RuntimeError, match="of which only codes were gathered"):
        codes + 1
    assert torch.equal(torch.zeros_like(codes), torch.zeros(4, 8))
