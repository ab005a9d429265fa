"""Codes of 2 bits travel in place of float32 weights: equal to the bit, never of stale scales, and as many bytes as foreseen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices.pair import Pair
from devices.test_sharding import checkpointed, model, tokens, trained, unchanged
from devices.test_sharding import on_two as in_floats
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from qat.config import QuantConfig
from qat.conversion.layers import bitlinears
from qat.ops.options import WeightOptions, weight_options
from qat.ops.shards.gathered import GatheredCodes
from qat.ops.shards.serving import unfit
from qat.parallel import rank, size
from qat.parallel.traffic import all_gather, all_reduce, reduce_scatter
from qat.quantizers import QUANTIZERS
from qat.training.strategies.codes import gather_codes
from qat.training.strategies.sharding import collect, sharded
from qat.training.strategies.shards import local, whole

WAYS: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"granularity": "channel"},
    "group": {"granularity": "group", "group_size": 4},
    "absmax channel": {"scale": "absmax", "granularity": "channel"},
    "absmedian group": {"scale": "absmedian", "granularity": "group", "group_size": 2},
    "bfloat16 scale, multiplied": {"scale_dtype": "bfloat16", "scale_multiplier": 1.3},
    "components": {"components": 2, "granularity": "channel"},
    "components in groups": {"components": 3, "granularity": "group", "group_size": 4},
    "binary": {"weight": "binary"},
    "binary channel": {"weight": "binary", "granularity": "channel"},
    "twn": {"weight": "twn", "granularity": "channel"},
    "sherry": {"weight": "sherry", "granularity": "channel"},
    "reference": {"kernels": "reference"},
    "int8 gradients": {"backward": "int8"},
    "bf16 gradients": {"backward": "bf16", "granularity": "channel"},
    "4-bit inputs": {"act_bits": 4, "act_hadamard": True},
    "subln": {"rms_norm_eps": 1e-6},
}


class Sent(TorchDispatchMode):
    """Bytes that this rank sends, by collective, as a ring sends them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, others = func.overloadpacket.__name__, size() - 1
        if name == "_allgather_base_":
            self.bytes["gather"] += others * args[1].nbytes
        elif name == "_reduce_scatter_base_":
            self.bytes["reduce"] += others * args[0].nbytes
        elif name == "allreduce_":
            self.bytes["sum"] += sum(2 * others * one.nbytes // size() for one in args[0])
        elif func.namespace == "c10d":
            raise AssertionError(f"{name} was not foreseen")
        return func(*args, **(kwargs or {}))


def made(quant: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """A model, and the same in parts that are gathered as codes."""
    original = model(quant)
    mesh = init_device_mesh("cpu", (size(),))
    reasons: list[dict[str, str]] = []
    shell = sharded(original, mesh, lambda parts: reasons.append(gather_codes(parts, mesh)))
    assert reasons == [{}]
    return original, shell


def on_ranks(quant: dict[str, Any], prepare: Callable[[nn.Module], None] = unchanged) -> dict[str, Tensor]:
    original, shell = made(quant)
    seen: set[type] = set()
    for _, layer in bitlinears(shell):
        layer.register_forward_pre_hook(lambda layer, _: seen.add(type(layer.weight.data)))
    trained(shell, lambda step: [tokens(step, rank())], prepare)
    assert seen == {GatheredCodes}
    collect(shell, original)
    return original.state_dict()


def check(pair: Pair, quant: dict[str, Any], prepare: Callable[[nn.Module], None] = unchanged) -> None:
    ranks, alone = pair(on_ranks, quant, prepare, seconds=240), model(quant)
    trained(alone, lambda step: [tokens(step, one) for one in range(pair.size)], prepare)
    for name, value in alone.state_dict().items():
        assert all(torch.equal(found[name], value) for found in ranks), name


@pytest.mark.parametrize("way", WAYS)
def test_layers_train_as_on_one_process(pair: Pair, way: str) -> None:
    check(pair, WAYS[way])


def test_activation_checkpointing(pair: Pair) -> None:
    check(pair, {}, checkpointed)


def test_a_last_rank_with_fewer_rows() -> None:
    """Of 28 rows 10, 10 and 8; of 16 rows 6, 6 and 4; of 8 rows 3, 3 and 2. One process rounds thirds elsewhere."""
    three = Pair(3)
    try:
        for quant in ({}, {"granularity": "group", "group_size": 2}):
            for codes, floats in zip(three(on_ranks, quant, seconds=240), three(in_floats, quant, seconds=240), strict=True):
                assert codes.keys() == floats.keys()
                assert [name for name, value in codes.items() if not torch.equal(value, floats[name])] == []
    finally:
        three.close()


def counted(quant: dict[str, Any], codes: bool) -> tuple[Counter[str], list[tuple[str, tuple[int, int]]]]:
    """What a step of one batch sends; and (kind, shape) of each parameter."""
    original = model(quant)
    mesh = init_device_mesh("cpu", (size(),))
    shell = sharded(original, mesh, (lambda parts: gather_codes(parts, mesh)) if codes else None)
    latent = {id(layer.weight) for _, layer in bitlinears(original)}
    shapes = [("latent" if id(p) in latent else "other", (len(p), p[0].numel())) for p in original.parameters()]
    with Sent() as sent:
        shell(tokens(0, rank())).logits.square().mean().backward()
    return sent.bytes, shapes


@pytest.mark.parametrize("way", ["tensor", "channel", "group", "components in groups"])
def test_bytes_sent_are_those_of_the_cost_model(pair: Pair, way: str) -> None:
    quant, devices = WAYS[way], 2
    config = QuantConfig(**quant)
    for found, shapes in pair(counted, quant, True):
        latent, other = ([shape for kind, shape in shapes if kind == wanted] for wanted in ("latent", "other"))
        scales = {"tensor": lambda k: 0, "channel": lambda k: 1, "group": lambda k: k // config.group_size}[config.granularity]
        gather = (
            all_gather([(n, config.planes * k) for n, k in latent], devices, 2)
            + all_gather([(n, config.planes * scales(k)) for n, k in latent], devices, 32)
            + all_gather(other, devices, 32)
        )
        assert found["gather"] == 2 * gather and found["reduce"] == reduce_scatter(latent + other, devices)
        assert found["sum"] == (all_reduce(2 * 8 * len(latent), devices) if config.granularity == "tensor" else 0)
    for found, shapes in pair(counted, quant, False):
        everything = [shape for _, shape in shapes]
        assert found["gather"] == 2 * all_gather(everything, devices, 32) and found["sum"] == 0
        assert found["reduce"] == reduce_scatter(everything, devices)


def changed_behind_its_back() -> list[float]:
    """Losses of a model in parts and of one process, before and after weights changed without a version counter's notice."""
    original, shell = made({})
    losses = []
    for factor in (1.0, 3.0):
        with torch.no_grad():
            for p in original.parameters():
                p.data.mul_(factor)
            for p in shell.parameters():
                p._local_tensor.data.mul_(factor)  # type: ignore[attr-defined]
        losses += [float(one(tokens(0, 0)).logits.square().mean()) for one in (shell, original)]
    return losses


def test_scales_are_never_stale(pair: Pair) -> None:
    for before, wanted_before, after, wanted_after in pair(changed_behind_its_back):
        assert before == wanted_before and after == wanted_after and before != after


def changed_meanwhile(quant: dict[str, Any]) -> bool:
    """Whether gradients are one process's where latent weights changed behind the forward pass, of whose codes they are."""
    original, shell = made(quant)
    gradients = []
    for one in (shell, original):
        loss = one(tokens(0, 0)).logits.square().mean()
        for _, layer in bitlinears(one):
            local(layer.weight).data.neg_()
        loss.backward()
        gradients.append([whole(p.grad) for p in one.parameters() if p.grad is not None])
    return all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize("way", ["tensor", "channel"])
def test_a_backward_pass_gathers_the_codes_of_its_forward_pass(pair: Pair, way: str) -> None:
    assert pair(changed_meanwhile, WAYS[way]) == [True, True]


def part_alone() -> None:
    _, shell = made({})
    shell(tokens(0, 0))
    with torch.no_grad():
        for p in shell.parameters():
            p.mul_(3.0)
    shell.model.layers[0](torch.randn(1, 4, 16), position_embeddings=(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)))  # type: ignore[index,union-attr,operator]


def test_a_part_of_a_model_does_not_run_with_scales_of_before(pair: Pair) -> None:
    for failure in pair.failures(part_alone):
        assert failure is not None and "is not that of its weights now: run the whole model" in failure


def floats_asked() -> None:
    _, shell = made({})
    next(layer for _, layer in bitlinears(shell)).register_forward_pre_hook(lambda layer, _: layer.weight + 1)
    shell(tokens(0, 0))


def test_who_asks_for_floats_is_told(pair: Pair) -> None:
    for failure in pair.failures(floats_asked):
        assert failure is not None and "of which only codes were gathered" in failure


def left(quant: dict[str, Any]) -> tuple[dict[str, str], bool]:
    original = model(quant)
    mesh = init_device_mesh("cpu", (size(),))
    reasons: dict[str, str] = {}
    shell = sharded(original, mesh, lambda parts: reasons.update(gather_codes(parts, mesh)))
    alone = original(tokens(0, 0)).logits
    return reasons, torch.equal(shell(tokens(0, 0)).logits, alone)


@pytest.mark.parametrize("quant,why", [
    ({"weight": "lsq"}, "step and unit of its quantizer change beside the weight"),
    ({"weight": "ternary_clipped"}, "the gradient of its quantizer needs the weight itself"),
    ({"weight": "tequila"}, "its quantizer adds to the bias what it takes from the weight itself"),
    ({"weight": "twn"}, "it has one scale, which its quantizer takes of the whole weight"),
    ({"scale": "absmax"}, "it has one scale, and absmax is no sum over its parts"),
])  # fmt: skip
def test_what_cannot_travel_as_codes_is_said_and_travels_in_float32(pair: Pair, quant: dict[str, Any], why: str) -> None:
    for reasons, equal in pair(left, quant):
        assert set(reasons.values()) == {why} and len(reasons) == 14 and equal


def test_every_row_of_the_table_is_served_or_has_a_reason() -> None:
    served = {}
    for name, row in QUANTIZERS.items():
        for granularity in row.granularities:
            config = QuantConfig(weight=name, granularity=granularity, group_size=4 if granularity == "group" else None)
            served[name, granularity] = unfit(WeightOptions(*weight_options(config))) is None
    assert {name for (name, granularity), one in served.items() if one and granularity == "tensor"} == {"ternary", "binary"}
    assert {name for (name, granularity), one in served.items() if one and granularity == "channel"} == {
        "ternary", "binary", "twn", "ternary_count", "sherry",
    }  # fmt: skip
