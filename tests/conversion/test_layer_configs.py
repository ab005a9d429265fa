"""Layers quantized in other ways than the rest: patterns, records, packed folders and their readers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import SIZES, Model
from torch import nn

import qat
from qat import QuantConfig
from qat.conversion.layers import quantized_layers
from qat.conversion.overrides import gathered, layer_config
from qat.conversion.record import Conversion
from qat.formats.bitnet import limits as hf_limits
from qat.formats.gguf import writing as gguf
from qat.formats.packed import folder as packed
from qat.inspect import inspect

IDS = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
MIXED = {"*.down_proj": {"components": 2}, "model.layers.1.self_attn": {"components": 2, "granularity": "channel"}}


def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def mixed(**options: Any) -> QuantConfig:
    return QuantConfig(component_scales="learned", overrides=MIXED, **options)


def components(model: nn.Module) -> dict[str, int]:
    return {name: layer.config.components for name, layer in quantized_layers(model).items()}


def test_the_last_pattern_that_fits_wins_key_by_key() -> None:
    config = QuantConfig(
        granularity="channel",
        budget_bits=4,
        overrides={"*.down": {"components": 3}, "a": {"components": 2}, "a.down": {"granularity": "tensor"}},
    )
    assert layer_config(config, "b.up") == QuantConfig(granularity="channel")
    assert layer_config(config, "b.down") == QuantConfig(granularity="channel", components=3)
    assert layer_config(config, "a.up") == QuantConfig(granularity="channel", components=2)
    assert layer_config(config, "a.down") == QuantConfig(components=2)


def test_layers_and_back() -> None:
    names = {"a.up": 1, "a.down[0]": 2, "a.down0": 1}
    layers = {name: QuantConfig(components=k) for name, k in names.items()}
    whole = gathered(layers)
    assert whole == QuantConfig(overrides={"a.down[[]0]": {"components": 2}})
    assert {name: layer_config(whole, name) for name in layers} == layers
    with pytest.raises(ValueError, match="b and a have different configs"):
        gathered({"a": QuantConfig(), "b": QuantConfig(act_bits=None)})


def test_a_mixed_model_trains_packs_and_is_read_back(tmp_path: Path) -> None:
    model = llama()
    record = qat.convert(model, mixed())
    found = components(model)
    twice = [name for name, k in found.items() if k == 2]
    assert len(found) == 14 and [name.rpartition(".")[2] for name in twice] == [
        "down_proj",
        *(f"{x}_proj" for x in "qkvo"),
        "down_proj",
    ]
    assert all(layer.config.overrides == {} for layer in quantized_layers(model).values())
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    expected, again = model(input_ids=IDS).logits.detach(), llama()
    Conversion.from_json(record.to_json()).apply(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(input_ids=IDS).logits, expected)
    packing = qat.pack(model, layout="base3")
    assert torch.equal(model(input_ids=IDS).logits, expected) and components(model) == found
    empty = llama()
    packing.apply(empty)
    assert components(empty) == found
    packed.save(model, tmp_path / "packed")
    for loaded in (packed.load(tmp_path / "packed"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")):
        assert torch.equal(loaded(input_ids=IDS).logits, expected) and components(loaded) == found
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(packed.load(tmp_path / "again")(input_ids=IDS).logits, expected)
    body = transformers.AutoModel.from_pretrained(tmp_path / "packed")  # whose layers have other names
    assert components(body) == {name.removeprefix("model."): k for name, k in found.items()}
    said = inspect(str(tmp_path / "packed"))
    assert said["weights"] == sum(layer.weight.numel() for layer in llama().modules() if isinstance(layer, nn.Linear)) - 32 * 32
    downs, rest = said["other layers"].split("; ")
    words = "2 ternary components, learned scales per"
    assert downs == f"{words} tensor: model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj"
    assert rest.startswith(f"{words} channel: model.layers.1.self_attn.") and rest.count(",") == 3 + words.count(",")
    assert "down_proj: quant.components=2; the format holds one ternary matrix" in str(hf_limits.unsupported(model))
    assert "is a sum of 2 ternary matrices" in str(gguf.unsupported(model))
    qat.unpack(model)
    assert not components(model)


def test_a_plain_model_says_nothing_of_overrides(tmp_path: Path) -> None:
    """So that an older version reads what it can run."""
    model = llama()
    qat.convert(model, QuantConfig())
    qat.pack(model)
    packed.save(model, tmp_path / "packed")
    said = packed.read_config(tmp_path / "packed")["quantization_config"]["quant"]
    assert not {"overrides", "budget_bits", "component_scales"} & set(said)
    assert "other layers" not in inspect(str(tmp_path / "packed"))


def test_a_pattern_without_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quant.overrides: '\*.dwn' matches none of the 4 converted layers"):
        qat.convert(Model(), QuantConfig(overrides={"*.down": {"components": 2}, "*.dwn": {"components": 2}}))
    with pytest.raises(ValueError, match="quant.overrides: 'lm_head' matches none"):  # it is there, but not converted
        qat.convert(Model(), QuantConfig(overrides={"lm_head": {"components": 2}}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*": {"components": 5}}, r"quant.overrides, \*: quant.components=5 is not allowed"),
        ({"*": {"act_bits": None}}, r"quant.overrides has \*: .*act_bits.*; allowed are values for weight, scale, granularity"),
        ({"*": {}}, r"quant.overrides has \*: \{\}"),
        ({"*": 2}, r"quant.overrides has \*: 2"),
        ({"*": {"weight": "binary", "components": 2}}, r"quant.overrides, \*: quant.weight=binary does not fit"),
        ([], "quant.overrides=.* is not allowed; it must be names with values"),
    ],
)
def test_what_no_layer_can_be_is_refused(overrides: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(overrides=overrides)


def test_patterns_that_do_not_go_together_name_the_layer() -> None:
    config = QuantConfig(overrides={"*.down": {"weight": "binary"}, "blocks.0": {"components": 2}})
    with pytest.raises(
        ValueError, match=r"quant.overrides for blocks.0.down: quant.weight=binary does not fit quant.components=2"
    ):
        qat.convert(Model(), config)


def test_a_model_of_layers_that_differ_in_more_is_not_packed() -> None:
    model = Model()
    qat.convert(model, QuantConfig(), include="blocks.0")
    model.blocks[1].up = qat.BitLinear.from_linear(model.blocks[1].up, QuantConfig(act_bits=None))
    with pytest.raises(ValueError, match="blocks.1.up and blocks.0.up have different configs; have each part packed on its own"):
        qat.pack(model)
