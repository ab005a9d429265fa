"""The damage map: against converted models and their agreement, layer by layer, and a model that is left as it was."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from rich.console import Console
from tiny import SIZES
from torch import nn

import qat
from qat import QuantConfig
from qat.evaluation.damage import Damage, DamageMap, Meter, damage_map, quantized
from qat.metrics.agreement import agreement
from qat.metrics.perplexity import exp_mean, log_likelihood, windows

TOKENS = torch.randint(0, 32, (90,), generator=torch.Generator().manual_seed(0))
WINDOWS = list(windows(TOKENS, 24, 16, batch_size=2))
"""Windows that overlap, in batches of one and of two, the last of them cut."""
SPREAD = 4.0
"""Times the weights of a fresh model, whose predictions are all alike: so that there is something to damage."""


def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(SPREAD if weight.ndim == 2 else 1)
    return model


def gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def of_layers(build: object, config: QuantConfig) -> dict[str, QuantConfig]:
    return dict.fromkeys(qat.convert(build(), config).converted, config)  # type: ignore[operator]


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize(("form", "act_bits"), [("both", 8), ("weights", None)])
def test_all_layers_together_are_the_converted_model(build: object, form: str, act_bits: int | None) -> None:
    config = QuantConfig(granularity="channel", act_bits=act_bits)
    model, converted = build(), build()  # type: ignore[operator]
    qat.convert(converted, config)
    close = agreement(converted, model, WINDOWS)
    found = Meter(model, WINDOWS)(of_layers(build, QuantConfig(granularity="channel")), form)
    assert found.kl == pytest.approx(close.kl, rel=1e-3) and found.kl > 1e-4
    assert found.perplexity == pytest.approx(exp_mean(*log_likelihood(converted, WINDOWS)), rel=1e-4)


def test_the_map() -> None:
    model, layers = llama().train(), of_layers(llama, QuantConfig())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = damage_map(model, layers, WINDOWS)
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    assert found.tokens == sum(ids[:, start:].numel() for ids, start in WINDOWS) == 89
    assert found.full_precision.kl == 0
    assert found.full_precision.perplexity == pytest.approx(exp_mean(*log_likelihood(model, WINDOWS)), rel=1e-6)
    assert list(found.families) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert list(found.layers) == list(layers) and len(layers) == 14
    meter = Meter(model, WINDOWS)
    assert found.forms == {form: meter(layers, form) for form in ("weights", "activations", "both")}
    assert found.forms["activations"].kl < found.forms["weights"].kl / 10
    down = {name: config for name, config in layers.items() if name.endswith("down_proj")}
    assert found.families["down"] == meter(down)
    assert all(found.layers[name] == meter({name: layers[name]}) for name in down)
    assert len({damage.kl for damage in found.layers.values()}) == 14


def test_float_activations_are_not_rounded() -> None:
    model = llama()
    meter, layers = Meter(model, WINDOWS), of_layers(llama, QuantConfig(act_bits=None))
    assert meter(layers, "activations") == meter.full_precision
    assert meter(layers, "both") == meter(layers, "weights")


def test_more_components_do_less_damage() -> None:
    model = llama()
    meter, names = Meter(model, WINDOWS), of_layers(llama, QuantConfig())
    kls = [meter(dict.fromkeys(names, QuantConfig(components=k, granularity="channel"))).kl for k in (1, 2, 3)]
    assert kls[0] > 4 * kls[1] > 16 * kls[2]


def test_a_map_in_words_and_as_json() -> None:
    harm = {"weights": Damage(2.0, 0.5), "activations": Damage(1.0, 0.0), "both": Damage(800.0, 0.6)}
    layers = {"a.up": Damage(1.0, 0.1), "a.down": Damage(1.0, 0.3)}
    found = DamageMap(9, Damage(1.0, 0.0), harm, {"up": layers["a.up"], "down": layers["a.down"]}, layers)
    assert json.loads(json.dumps(found.to_dict()))["layers"]["a.down"] == {"nll": 1.0, "kl": 0.3}
    console = Console(width=80)
    with console.capture() as text:
        console.print(found.table())
    rows = [line.replace("│", " ").split() for line in text.get().splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["nothing", "weights", "activations", "both", "down", "up", "a.down", "a.up"]
    assert rows[1] == ["weights", "7.389", "0.5"] and rows[3][1] == "inf"
    assert found.full_precision.perplexity == pytest.approx(math.e)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), quantized(model, {"model.layers.0.mlp.up_proj": QuantConfig()}, True, True):
        assert not torch.equal(layer.weight, before)
        raise RuntimeError("stop")
    assert torch.equal(layer.weight, before) and not layer._forward_pre_hooks


def test_what_cannot_be_measured_is_refused() -> None:
    model = llama()
    with pytest.raises(ValueError, match="no layer is given"):
        damage_map(model, {}, WINDOWS)
    with pytest.raises(ValueError, match="'model.norm' is a LlamaRMSNorm in this LlamaForCausalLM"):
        damage_map(model, {"model.norm": QuantConfig()}, WINDOWS)
    with pytest.raises(ValueError, match="'up_proj' is missing in this LlamaForCausalLM"):
        damage_map(model, {"up_proj": QuantConfig()}, WINDOWS)
    with pytest.raises(ValueError, match="score no token"):
        damage_map(model, of_layers(llama, QuantConfig()), [])
    nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="the damage of nothing is nan"):
        damage_map(model, of_layers(llama, QuantConfig()), WINDOWS)
