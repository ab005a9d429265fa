"""Layers are found by what they do, in architectures of several forms, and the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from qat.losses.layers import find_layers, with_first

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4}
GPT2 = {"vocab_size": 32, "n_embd": 32, "n_layer": 3, "n_head": 4}
MOE = {**SIZES, "num_local_experts": 4, "num_key_value_heads": 2}
OPT = {
    "vocab_size": 32,
    "hidden_size": 32,
    "ffn_dim": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
}
BLOOM = {"vocab_size": 32, "hidden_size": 32, "n_layer": 1, "n_head": 4}


@pytest.mark.parametrize(
    ("kind", "sizes", "path"),
    [
        ("llama", SIZES, "model.layers"),
        ("llama", {**SIZES, "num_hidden_layers": 1}, "model.layers"),
        ("gpt2", GPT2, "transformer.h"),
        ("mixtral", MOE, "model.layers"),
        ("opt", OPT, "model.decoder.layers"),
        ("gpt_neox", SIZES, "gpt_neox.layers"),
        ("bloom", BLOOM, "transformer.h"),
    ],
)
def test_layers_of_an_architecture(kind: str, sizes: dict[str, Any], path: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).train()
    model.get_submodule(path)[0].eval()
    found, expected = find_layers(model), list(model.get_submodule(path))
    assert found.modules == expected and (found.calls, found.width, found.written) == (len(expected), 32, False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training and not expected[0].training


class Block(nn.Module):
    def __init__(self, writes: bool = False, residual: bool = True) -> None:
        super().__init__()
        self.linear, self.writes, self.residual = nn.Linear(8, 8), writes, residual

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        if not self.residual:
            return self.linear(x), None
        return (x.add_(self.linear(x)) if self.writes else x + self.linear(x)), None


class Own(nn.Module):
    """Layers held in several ways, in names that say nothing; `calls` each one as often."""

    def __init__(self, blocks: list[nn.Module], held: str, calls: int = 1, skip: bool = False) -> None:
        super().__init__()
        self.table, self.calls, self.skip = nn.Embedding(16, 8), calls, skip
        self.norm_a, self.norm_b, self.out = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 16)
        if held == "attributes":
            for i, block in enumerate(blocks):
                setattr(self, f"part_{i}", block)
        else:
            self.parts = {"list": nn.ModuleList, "sequence": lambda all: nn.Sequential(*all)}[held](blocks)
        self._order = blocks if held == "attributes" else list(self.parts)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        x = self.norm_a(self.table(input_ids)) + 0
        for block in self._order:
            for _ in range(self.calls):
                x = x + block(x)[0] if self.skip else block(x)[0]
        return self.out(self.norm_b(x))


@pytest.mark.parametrize("held", ["list", "sequence", "attributes"])
def test_layers_however_they_are_held(held: str) -> None:
    blocks = [Block() for _ in range(3)]
    found = find_layers(Own(blocks, held))
    assert found.modules == blocks and found.calls == 3 and not found.written


def test_shared_layers_count_as_often_as_they_are_called() -> None:
    found = find_layers(Own([Block()], "list", calls=4))
    assert len(found.modules) == 1 and found.calls == 4


def test_layers_that_write_into_their_input_are_told() -> None:
    assert find_layers(Own([Block(writes=True), Block(writes=True)], "list")).written


def test_a_list_that_gives_no_residual_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Own has no layers that can be told.*set distill.hidden, distill.cosine"):
        find_layers(Own([Block(residual=False), Block(residual=False)], "list", skip=True))


def test_random_numbers_are_left_as_they_were(tiny_model: Any) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model, attention_dropout=0.5).train()
    before = torch.get_rng_state()
    find_layers(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_states_in_what_a_layer_gives() -> None:
    states, other, rest = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    assert with_first(states, other) is other and with_first((states, rest), other) == (other, rest)
    given = BaseModelOutput(last_hidden_state=states, hidden_states=(rest,))
    found = with_first(given, other)
    assert type(found) is BaseModelOutput and found[0] is found.last_hidden_state is other and found.hidden_states == (rest,)
    assert given[0] is given.last_hidden_state is states
