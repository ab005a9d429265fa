"""A budget of bits: which layers get a second component, by measured gain for a bit, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from rich.console import Console
from tiny import SIZES

import qat
from qat import QuantConfig
from qat.evaluation.budget import Budget, Share, check_budget, choose, component_bits, spend
from qat.evaluation.damage import Meter
from qat.metrics.perplexity import windows

WINDOWS = list(windows(torch.randint(0, 32, (60,), generator=torch.Generator().manual_seed(0)), 24))


def model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    found = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for weight in found.parameters():
            weight.mul_(4 if weight.ndim == 2 else 1)
    return found


def test_layers_are_taken_by_gain_for_a_cost() -> None:
    gains, costs = {"a": 3.0, "b": 4.0, "c": 1.0, "d": 0.0, "e": -1.0}, {"a": 3.0, "b": 2.0, "c": 1.0, "d": 1.0, "e": 1.0}
    assert choose(gains, costs, 1.5) == {"c"}
    assert choose(gains, costs, 2) == {"b"}
    assert choose(gains, costs, 3.5) == {"b", "c"}  # a, at a tie before c, no longer fits
    assert choose(gains, costs, 100) == {"a", "b", "c"}
    assert choose(gains, costs, 0) == set()


@pytest.mark.parametrize(("layout", "bits"), [("2bit", 2.5), ("base3", 2.0)])
def test_a_budget_is_spent_on_what_gains_most_for_a_weight(layout: str, bits: float) -> None:
    base, config = model(), QuantConfig(granularity="channel")
    layers = dict.fromkeys(qat.convert(model(), config).converted, config)
    found = spend(base, layers, WINDOWS, bits, layout)
    assert spend(base, layers, WINDOWS, bits, layout) == found
    meter = Meter(base, WINDOWS)
    share = next(one for one in found.shares if one.name.endswith("1.mlp.down_proj"))
    more = QuantConfig(granularity="channel", components=2)
    gain = meter({share.name: config}, "weights").kl - meter({share.name: more}, "weights").kl
    assert share.gain == gain > 0 and share.weights == 32 * 44
    assert [one.name for one in found.shares] == list(layers)
    assert bits - 0.3 < found.spent <= bits and found.chosen
    total, codes = sum(one.weights for one in found.shares), sum(one.weights * one.components for one in found.shares)
    assert found.spent == pytest.approx(codes / total * {"2bit": 2, "base3": 1.6}[layout])
    worth = {one.name: one.gain / one.weights for one in found.shares}
    best, left = max(worth, key=lambda name: worth[name]), [one for one in found.shares if one.components == 1]
    room = (bits - found.spent) / component_bits(layout) * total
    assert best in found.chosen and all(one.weights > room for one in left)
    assert Budget.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_layers_that_have_two_already_count_and_get_no_more() -> None:
    base, names = model(), qat.convert(model()).converted
    layers = {name: QuantConfig(components=2 if name.endswith("down_proj") else 1) for name in names}
    found = spend(base, layers, WINDOWS, 2.4, "2bit")
    assert all(one.components == 2 and one.gain == 0 for one in found.shares if one.name.endswith("down_proj"))
    assert found.spent <= 2.4


def test_a_budget_in_words() -> None:
    found = Budget(2.5, "2bit", 9, (Share("a.up", 300, 0.1, 1), Share("a.down", 100, 0.3, 2)))
    assert found.chosen == ["a.down"] and found.spent == 2.5
    console = Console(width=90)
    with console.capture() as text:
        console.print(found.table())
    rows = [line.replace("│", " ").split() for line in text.get().splitlines() if "│" in line]
    assert rows == [["a.down", "100", "0.3", "2"], ["a.up", "300", "0.1", "1"]]
    assert "1 of 2 layers get 2 components: 2.500 bits a weight" in text.get()


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [
        ({"budget_bits": 1.9}, "2bit", r"quant.budget_bits=1.9 is below the 2 bits of one component in export.layout=2bit"),
        ({"budget_bits": 1.5}, "base3", r"quant.budget_bits=1.5 is below the 1.6 bits of one component in export.layout=base3"),
        ({"budget_bits": 3.0, "weight": "binary"}, "2bit", "quant.weight=binary, which cannot be a sum of 2"),
        ({"budget_bits": 3.0, "components": 2}, "2bit", "does not fit quant.components=2"),
        ({"budget_bits": 3.0, "scale": "absmax"}, "2bit", "quant.scale=absmax does not fit quant.components=2"),
    ],
)
def test_a_budget_that_cannot_be_spent_is_refused(options: dict[str, object], layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_budget(QuantConfig(**options), layout)  # type: ignore[arg-type]


def test_a_budget_that_can_is_not() -> None:
    check_budget(QuantConfig(budget_bits=1.6), "base3")
    check_budget(QuantConfig(weight="binary"), "2bit")
