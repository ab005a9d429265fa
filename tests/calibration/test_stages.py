"""The order in which layers are calibrated, and what their outputs are added to, found while models run."""

import pytest
import torch
from tiny import SIZES, Model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

import qat
from qat.calibration.recorder import Arguments, record
from qat.calibration.stages import stages

IDS = torch.randint(16, (2, 10), generator=torch.Generator().manual_seed(0))


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    import copy

    return {name: model.get_submodule(name) for name in qat.convert(copy.deepcopy(model)).converted}


def of(config: object) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_layers_of_a_llama_block_in_order_of_execution():
    model = of(LlamaConfig(**SIZES))
    found = stages(model, layers_of(model), [IDS, IDS])
    assert [stage.name for stage in found] == ["model.layers.0", "model.layers.1"]
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert found[1].groups == [
        [attention + "q_proj", attention + "k_proj", attention + "v_proj"],
        [attention + "o_proj"],
        [mlp + "gate_proj", mlp + "up_proj"],
        [mlp + "down_proj"],
    ]
    assert len(found[0].arguments) == 2 and found[0].arguments[0].first().shape == (2, 10, 32)


@pytest.mark.parametrize(
    "config, writers",
    [
        (LlamaConfig(**SIZES), {"o_proj", "down_proj"}),
        (GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=4, n_positions=64), {"attn.c_proj", "mlp.c_proj"}),
        (GPTNeoXConfig(**SIZES, rotary_pct=0.5), {"attention.dense", "dense_4h_to_h"}),
    ],
    ids=["llama", "gpt2", "gpt_neox"],
)
def test_layers_that_write_into_the_residual_stream(config, writers):
    model = of(config)
    with torch.no_grad():
        calls, _ = record(model, Arguments((), {"input_ids": IDS, "use_cache": False}), layers_of(model))
    assert all((call.stream is not None) == call.name.endswith(tuple(writers)) for call in calls)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 1
        h += self.first(x).view(-1, 4).reshape(x.shape)
        return h + self.second(h) * 0.5


def test_stream_is_what_it_was_before_the_sum():
    """Also where the sum takes its place; a scaled output is not followed."""
    model, x = InPlace(), torch.randn(2, 3, 4)
    with torch.no_grad():
        (first, second), output = record(model, Arguments((x,), {}), dict(model.named_children()))
    assert torch.equal(first.stream, x) and second.stream is None and output is not None
    assert not model.first._forward_hooks and not model.second._forward_hooks


def test_a_run_ends_with_the_last_call_that_is_wanted():
    model = InPlace()
    calls, output = record(model, Arguments((torch.randn(2, 4),), {}), {"first": model.first}, 1)
    assert len(calls) == 1 and output is None and not model.first._forward_hooks


class Reversed(Model):
    """Its blocks are called in another order than they are listed in."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in reversed(self.blocks):
            x = block(x)
        return self.lm_head(x)


def test_a_model_without_a_chain_of_blocks_is_one_stage():
    model = Reversed()
    layers = {name: model.get_submodule(name) for name in ("blocks.0.up", "blocks.0.down", "blocks.1.up", "lm_head")}
    (found,) = stages(model, layers, [IDS])
    assert found.name == "" and found.groups == [["blocks.1.up"], ["blocks.0.up"], ["blocks.0.down"], ["lm_head"]]


class Straight(Model):
    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return super().forward(input_ids)


def test_layers_outside_the_blocks_have_stages_of_their_own():
    model = Straight()
    names = ("blocks.0.up", "blocks.0.down", "blocks.1.up", "lm_head")
    found = stages(model, {name: model.get_submodule(name) for name in names}, [IDS])
    assert [(stage.name, stage.groups) for stage in found] == [
        ("blocks.0", [["blocks.0.up"], ["blocks.0.down"]]),
        ("blocks.1", [["blocks.1.up"]]),
        ("", [["lm_head"]]),
    ]
