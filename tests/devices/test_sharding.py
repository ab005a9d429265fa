"""FSDP2 over two processes: weights of every kind of layer are, step after step, those of one process that has both batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices.pair import Pair
from tiny import SIZES
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import qat
from qat.config import OptimConfig
from qat.conversion.layers import bitlinears, set_beta, set_lambda
from qat.parallel import rank, size
from qat.quantizers import QUANTIZERS
from qat.training.gradients.clipping import clip
from qat.training.gradients.groups import parameter_groups
from qat.training.plugins import any_rows
from qat.training.strategies.sharding import collect, sharded, units
from qat.training.strategies.shards import local

STEPS, VOCABULARY = 3, 24


class Llama(LlamaForCausalLM):
    """Layers whose rows two processes do not share evenly, and a tied embedding."""

    def __init__(self) -> None:
        small = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2}
        super().__init__(LlamaConfig(**{**SIZES, **small, "tie_word_embeddings": True, "attention_bias": True}))


def model(quant: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    found = Llama()
    for p in found.parameters():
        nn.init.normal_(p, std=0.1)
    qat.convert(found, qat.QuantConfig(**quant))
    return found.train()


def tokens(step: int, batch: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(10 * step + batch))


def trained(of: nn.Module, batches: Callable[[int], list[Tensor]], prepare: Callable[[nn.Module], None]) -> None:
    """Steps by the mean of the batches' losses; two batches on one process are one on each of two."""
    optimizer = any_rows(partial(torch.optim.AdamW, fused=True))(parameter_groups(of, OptimConfig(lr=1e-2, weight_decay=0.1)))
    for step in range(STEPS):
        prepare(of)
        for ids in batches(step):
            logits = of(ids).logits[:, :-1]
            (F.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1)) / len(batches(step))).backward()
        clip(of.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()


def softened(of: nn.Module) -> None:
    set_beta(of, 3.0)


def blended(of: nn.Module) -> None:
    set_lambda(of, 0.5)


def checkpointed(of: nn.Module) -> None:
    of.gradient_checkpointing_enable()  # type: ignore[operator]


def validated(of: nn.Module) -> None:
    """Also before the first step, where nothing has been gathered yet."""
    with torch.inference_mode():
        of.eval()
        of(tokens(9, 0))
        of.generate(tokens(9, 1), max_new_tokens=3, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        of.train()


def unchanged(of: nn.Module) -> None:
    pass


def on_two(quant: dict[str, Any], prepare: Callable[[nn.Module], None] = unchanged) -> dict[str, Tensor]:
    """The state after training; each rank returns its own copy of it."""
    original = model(quant)
    shell = sharded(original, init_device_mesh("cpu", (size(),)))
    assert all(local(p).numel() < p.numel() for p in shell.parameters() if len(p) > 1)
    trained(shell, lambda step: [tokens(step, rank())], prepare)
    collect(shell, original)
    return original.state_dict()


def check(pair: Pair, quant: dict[str, Any], prepare: Callable[[nn.Module], None] = unchanged) -> None:
    ranks, alone = pair(on_two, quant, prepare, seconds=240), model(quant)
    before = copy.deepcopy(alone.state_dict())
    trained(alone, lambda step: [tokens(step, 0), tokens(step, 1)], prepare)
    for name, value in alone.state_dict().items():
        assert all(torch.equal(found[name], value) for found in ranks), name
    latent = {f"{name}.weight" for name, _ in bitlinears(alone)}
    assert latent and not any(torch.equal(value, before[name]) for name, value in alone.state_dict().items() if name in latent)


WAYS: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"granularity": "channel"},
    "group": {"granularity": "group", "group_size": 4},
    "absmax": {"scale": "absmax"},
    "absmedian": {"scale": "absmedian", "granularity": "channel"},
    "subln": {"rms_norm_eps": 1e-6},
    "rotated to 4 bits": {"act_hadamard": True, "act_bits": 4},
    "components": {"components": 2},
    "learned components": {"components": 2, "component_scales": "learned"},
    "reference": {"kernels": "reference"},
    "int8 gradients": {"backward": "int8"},
}


@pytest.mark.parametrize("way", WAYS)
def test_layers_train_as_on_one_process(pair: Pair, way: str) -> None:
    check(pair, WAYS[way])


@pytest.mark.parametrize("prepare", [softened, blended, checkpointed, validated])
def test_what_is_set_between_steps_is_as_on_one_process(pair: Pair, prepare: Callable[[nn.Module], None]) -> None:
    check(pair, {}, prepare)


@pytest.mark.parametrize("weight", [name for name in QUANTIZERS if name != "ternary"])
def test_quantizers_train_as_on_one_process(pair: Pair, weight: str) -> None:
    granularities = QUANTIZERS[weight].granularities
    check(pair, {"weight": weight, "granularity": granularities[0]})


def test_blocks_are_gathered_one_by_one() -> None:
    """Those that the class names; else those of a small run; what shares a weight with the rest belongs to it."""
    blocks = ["model.layers.0", "model.layers.1"]
    named, unnamed, tied = Llama(), Llama(), Llama()
    unnamed._no_split_modules = None
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    assert units(named) == units(unnamed) == blocks and units(tied) == []
    tied.model.layers[1].mlp.up_proj = nn.Linear(16, 28)
    tied.model.layers[1].mlp.gate_proj.weight = tied.model.layers[1].mlp.up_proj.weight
    assert units(tied) == blocks and units(nn.Linear(2, 2)) == []  # gathered whole
