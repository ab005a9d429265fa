"""What a layer is by place and shape, without a probe: selectors, adapters, other libraries' linear layers, stacked experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import qat

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
MOE = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def reasons(model: nn.Module, **more: object) -> dict[str, str]:
    return qat.convert(model, **more).skipped  # type: ignore[arg-type]


def test_a_router_by_another_name_stays_unless_named() -> None:
    def model() -> nn.Module:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("afmoe", **MOE))

    router = "model.layers.1.mlp.router.gate"
    record = qat.convert(model(), exclude="*.experts")
    assert record.skipped[router] == "a selector or gate, kept in full precision (4 outputs, num_experts)"
    assert {f"model.layers.1.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")} <= {*record.converted}
    assert router in qat.convert(model(), include=["*", router], exclude="*.experts").converted
    with torch.no_grad():
        probed = qat.convert(model(), exclude="*.experts", probe=torch.randint(3, 90, (1, 16)))
    assert router in probed.skipped


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pick = nn.Linear(16, 3)
        self.my_experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))


def test_as_many_outputs_as_there_are_experts_beside_it() -> None:
    assert reasons(Routed()) == {"pick": "MoE router, kept in full precision (3 outputs for 3 experts)"}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 12
        self.q, self.beta, self.ab, self.mix = (nn.Linear(96, n) for n in (96, 12, 24, 48))
        self.hyper = nn.Linear(2, 2)


def test_gates_of_heads_and_mixing_matrices_stay() -> None:
    record = qat.convert(Attention())
    assert record.converted == ["q", "mix"]
    assert record.skipped == {
        "beta": "a selector or gate, kept in full precision (12 outputs, num_heads)",
        "ab": "a selector or gate, kept in full precision (24 outputs, 2 x num_heads)",
        "hyper": "a gate or mixing matrix, kept in full precision ([2, 2])",
    }
    assert "hyper" in qat.convert(Attention(), include=["hyper"]).converted


def test_keys_of_one_head_are_no_gate() -> None:
    config = AutoConfig.for_model("llama", **{**SIZES, "num_attention_heads": 16, "num_key_value_heads": 1})
    record = qat.convert(AutoModelForCausalLM.from_config(config))  # 16 heads, and keys of 1 x 16
    assert len(record.converted) == 14


def test_an_indexer_of_sparse_attention_stays() -> None:
    class MyIndexer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wk = nn.Linear(64, 32)

    model = nn.ModuleDict({"indexer": MyIndexer(), "q": nn.Linear(64, 64)})
    assert reasons(model) == {"indexer.wk": "part of a sparse-attention indexer, kept in full precision"}


class Wrapped(nn.Module):
    """As peft wraps a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(64, 64)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": nn.Linear(64, 16)}), nn.ModuleDict({"default": nn.Linear(16, 64)})


class Side(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.lora_down, self.lora_up = nn.Linear(64, 64), nn.Linear(64, 16), nn.Linear(16, 64)


@pytest.mark.parametrize("kind", [Wrapped, Side])
def test_adapters_and_what_lies_under_them_stay(kind: type[nn.Module]) -> None:
    under = "q.base_layer" if kind is Wrapped else "q.linear"
    record = qat.convert(nn.ModuleDict({"q": kind(), "k": nn.Linear(64, 64)}), include=["*", under])  # naming it does not help
    assert record.converted == ["k"] and len(record.skipped) == 3
    assert all("merge adapters into the model before it is converted" in reason for reason in record.skipped.values())


def test_linear_layers_of_another_library_stay_unless_named() -> None:
    class Marked(nn.Linear):
        pass

    def model() -> nn.Module:
        return nn.Sequential(Marked(32, 32), nn.Linear(32, 32))

    reason = "Marked is a kind of nn.Linear of test_roles, which BitLinear would replace"
    assert reasons(model()) == {"0": reason} and reasons(model(), include=["*", "0"]) == {}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 8)), nn.Parameter(torch.randn(3, 8, 8))


class Mixture(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": Experts(), "shared_experts": nn.ModuleDict({"up": nn.Linear(8, 8, False)})})
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_stacked_experts_are_named_all_at_once_with_what_the_command_line_takes() -> None:
    with pytest.raises(ValueError, match="3-D parameter 'up'") as refused:
        qat.convert(Mixture(2))
    message = str(refused.value)
    assert all(f"layers.{i}.experts.{key} [3, 8, 8]" in message for i in (0, 1) for key in ("up", "down"))
    assert "; 86% of the model's weights." in message and """'model.exclude=["*.experts"]' on the command line""" in message
    record = qat.convert(Mixture(2), exclude="*.experts")
    assert record.converted == ["layers.0.shared_experts.up", "layers.1.shared_experts.up"]
    with pytest.raises(ValueError, match=r"layers.\{0,1,2,3,4,5,6,7,8\}.experts.up \[3, 8, 8\]"):
        qat.convert(Mixture(9))


def test_the_advice_spares_layers_that_could_be_converted() -> None:
    class Block(Experts):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 8)

    model = nn.ModuleDict({"a": nn.ModuleDict({"mlp": Block()}), "b": nn.ModuleDict({"mlp": nn.Linear(8, 8)})})
    with pytest.raises(ValueError, match=r"in Python exclude='a.mlp'"):
        qat.convert(model)


def test_the_command_line_takes_the_advice() -> None:
    import shlex

    from hydra.core.override_parser.overrides_parser import OverridesParser

    with pytest.raises(ValueError, match="on the command line") as refused:
        qat.convert(Mixture(1))
    quoted = str(refused.value).partition("pass ")[2].partition(" on the")[0]
    (override,) = OverridesParser.create().parse_overrides(shlex.split(quoted))
    assert override.key_or_group == "model.exclude" and [str(v).strip('"') for v in override.value()] == ["*.experts"]


def test_a_layer_that_all_passes_through_is_no_gate() -> None:
    """In a model that is a Sequential nothing runs beside its layers."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
    assert qat.convert(model).converted == ["0", "2"]
