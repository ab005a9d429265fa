"""Which layers are converted: the user's patterns, what is skipped with which reason, which models are refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny import Block, Model, assert_untouched
from torch import nn

import qat
from qat.conversion.layers import bitlinears

BLOCKS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")]


def test_all_but_the_head_is_converted_and_said() -> None:
    model = Model()
    record = qat.convert(model)
    assert record.converted == BLOCKS == [name for name, _ in bitlinears(model)]
    assert record.skipped == {"lm_head": "output head, kept in full precision"}
    assert record.summary() == "4 of 5 linear layers converted; skipped lm_head (output head, kept in full precision); not probed"


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, "*down", ["blocks.0.up", "blocks.1.up"]),
        ("*down", None, ["blocks.0.down", "blocks.1.down"]),
        (["blocks.0.*"], ["*.up"], ["blocks.0.down"]),
        ("*", None, BLOCKS),
        ("lm_head", None, ["lm_head"]),
        (["*", "lm_head"], "blocks.1.*", ["blocks.0.up", "blocks.0.down", "lm_head"]),
    ],
)
def test_patterns_choose(include: object, exclude: object, expected: list[str]) -> None:
    model = Model()
    record = qat.convert(model, include=include, exclude=exclude)
    assert record.converted == expected == [name for name, _ in bitlinears(model)]
    assert set(record.converted) | set(record.skipped) == {*BLOCKS, "lm_head"}


def test_a_pattern_stands_for_everything_inside() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "b": nn.Linear(4, 4)})
    assert qat.convert(model, exclude="a").converted == ["b"]


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(key: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=rf"{key}=.*typo' matches no module of Sequential"):
        qat.convert(model, **{key: ["0", "*.typo"]})
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("patterns", [{"include": "embed"}, {"exclude": "*"}, {"include": "lm_head", "exclude": "lm_head"}])
def test_zero_matches_is_an_error_that_lists_the_reasons(patterns: dict[str, str]) -> None:
    model = Model()
    with pytest.raises(
        ValueError, match="nothing to convert: 0 of 5 linear layers converted; skipped .* in Model; check include"
    ):
        qat.convert(model, **patterns)
    assert_untouched(model)


def test_a_model_without_linear_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to convert"):
        qat.convert(nn.Sequential(nn.ReLU()))


def test_a_tied_head_is_left_alone_whatever_its_name() -> None:
    model = Model()
    model.projection = nn.Linear(8, 16, bias=False)
    model.projection.weight = model.embed.weight
    record = qat.convert(model, include=["projection", "*up"])
    assert record.skipped["projection"] == "tied to the embedding embed" and type(model.projection) is nn.Linear


def test_a_weight_tied_to_a_custom_embedding_is_left_alone() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(16, 8))

    model = nn.ModuleDict({"lookup": Lookup(), "body": nn.Linear(8, 8), "out": nn.Linear(8, 16)})
    model["out"].weight = model["lookup"].table
    record = qat.convert(model)
    assert record.converted == ["body"] and record.skipped["out"] == "tied to Lookup lookup"


def test_routers_are_left_alone_unless_named() -> None:
    def moe() -> nn.ModuleDict:
        return nn.ModuleDict({"gate": nn.Linear(8, 2), "experts": nn.ModuleList([Block(), Block()])})

    record = qat.convert(moe())
    assert record.skipped == {"gate": "MoE router, kept in full precision"} and len(record.converted) == 4
    assert qat.convert(moe(), include=["gate"]).converted == ["gate"]


def test_a_gate_without_experts_is_an_ordinary_layer() -> None:
    assert qat.convert(nn.ModuleDict({"gate": nn.Linear(8, 8)})).converted == ["gate"]


def test_layers_that_a_walker_cannot_take_are_skipped_with_a_reason() -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.utils.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "own": Own(4, 4),
            "patched": patched,
            "normed": normed,
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "conv": nn.Conv1d(4, 4, 3),
            "lstm": nn.LSTM(4, 4),
        }
    )
    record = qat.convert(model)
    assert record.converted == ["plain"]
    assert record.skipped["own"] == "Own has a forward of its own"
    assert record.skipped["patched"] == "its forward was replaced by another"
    assert record.skipped["normed"].startswith("its weight is computed")
    assert record.skipped["parametrized"] == "its weight is parametrized"
    assert record.skipped["conv.weight"] == "Conv1d is neither nn.Linear nor Conv1D"
    assert record.skipped["lstm.weight_ih_l0"] == "LSTM is neither nn.Linear nor Conv1D"


def test_a_layer_whose_weight_the_parent_reads_itself_is_skipped() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read, self.checked = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            nn.init.zeros_(self.called.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.checked(self.called(x).to(self.checked.weight.dtype))
            return nn.functional.linear(x, self.read.weight)

    record = qat.convert(Parent())
    assert record.converted == ["called", "checked"] and record.skipped == {"read": "Parent reads this weight itself"}


def test_multihead_attention_says_that_it_reads_its_weights_itself() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    record = qat.convert(model)
    assert record.converted == ["mlp"]
    assert "never calls the layer" in record.skipped["attention.out_proj"] and "attention.in_proj_weight" in record.skipped


def test_experts_in_one_3d_parameter_are_refused_and_then_excluded_knowingly() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Parameter(torch.randn(3, 8, 8))

    model = nn.ModuleDict({"attention": nn.Linear(8, 8), "mlp": nn.ModuleDict({"experts": Experts()})})
    message = r"mlp.experts \(Experts\) stores 3 expert matrices as the one 3-D parameter 'gate_up' \[3, 8, 8\]"
    with pytest.raises(ValueError, match=message) as refused:
        qat.convert(model)
    assert_untouched(model)
    hint = str(refused.value).rpartition("exclude=")[2].strip("'")
    record = qat.convert(model, exclude=hint)
    assert record.converted == ["attention"] and list(record.skipped) == ["mlp.experts.gate_up"]


@pytest.mark.parametrize("prepare", [qat.convert, lambda model: (qat.convert(model), qat.pack(model))])
def test_a_converted_model_is_refused(prepare: object) -> None:
    model = Model()
    prepare(model)
    with pytest.raises(ValueError, match="already converted: blocks.0.up is a (Packed)?BitLinear"):
        qat.convert(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantized_weight_is_refused(dtype: torch.dtype) -> None:
    model = Model()
    model.blocks[1].up.weight = nn.Parameter(torch.zeros(12, 8).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match="already quantized: blocks.1.up holds torch"):
        qat.convert(model)


def test_a_quantized_layer_of_another_class_is_refused() -> None:
    foreign = nn.Module()
    foreign.register_buffer("weight", torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"already quantized: 1 holds torch.uint8 weights"):
        qat.convert(nn.Sequential(nn.Linear(4, 4), foreign))


def test_a_quantization_config_is_refused() -> None:
    model = Model()
    model.config = type("Config", (), {"quantization_config": {"bits": 4}})()
    with pytest.raises(ValueError, match="already quantized: the model's config has a quantization_config"):
        qat.convert(model)


def test_a_layer_without_weights_stays_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4), nn.Linear(4, 4))
    record = qat.convert(model)
    assert list(record.converted) == ["2"]
    assert record.skipped["0"] == "it has no weights (shape [0, 4])"
    assert record.skipped["1"] == "it has no weights (shape [4, 0])"
    assert model(torch.randn(2, 4)).shape == (2, 4)
