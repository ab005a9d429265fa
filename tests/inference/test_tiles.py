"""Fusion in models that are not Llama: any order, any input, whatever nn.Linear can be asked for; and what it costs nobody."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.inference import tiles
from qat.inference.digits import DigitLinear
from qat.inference.heads import HalfEmbedding, RowLinear
from qat.ops import cpu

pytestmark = pytest.mark.skipif(not cpu.compiled(), reason=f"no compiled kernels: {cpu.status().why}")


class MLP(nn.Module):
    """`rule(gate, up, x)`: how the projections are called."""

    def __init__(self, rule: object) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.rule(self.gate_proj, self.up_proj, x))  # type: ignore[operator]


class Language(nn.Module):
    """What `tile_checked` runs."""

    def __init__(self, rule: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mlp, self.head = nn.Embedding(16, 64), MLP(rule), nn.Linear(64, 16)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.mlp(self.embed(input_ids))))


def packed(rule: object) -> Language:
    model = Language(rule).eval().requires_grad_(False)
    qat.convert(model, exclude="head")
    qat.pack(model)
    return model


def written(gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    x = x.clone()
    first = gate(x)
    return first * up(x.mul_(2))


RULES = {
    "usual": lambda gate, up, x: gate(x).sigmoid() * up(x),
    "up first": lambda gate, up, x: up(x) * gate(x).sigmoid(),
    "another input": lambda gate, up, x: gate(x).sigmoid() * up(2 * x),
    "one alone": lambda gate, up, x: up(x),
    "twice": lambda gate, up, x: gate(x) * up(x) + gate(x),
    "asked": lambda gate, up, x: up(x.to(up.weight.dtype)) * gate(x)[..., : gate.out_features] + gate.bias.sum() + up.in_features,
    "kept": lambda gate, up, x: gate(x) * up(x + 0) + up(x),
}


@pytest.mark.parametrize("rule", RULES)
def test_fused_projections_in_any_order_give_the_same_bits(rule: str) -> None:
    model, ids = packed(RULES[rule]), torch.randint(16, (2, 5))
    before = model(ids).logits
    assert tiles.tile_checked(model) == "3 packed layers tiled, some as one"
    assert isinstance(model.mlp.gate_proj, tiles.Leader) and isinstance(model.mlp.up_proj, tiles.Follower)
    for _ in range(2):
        assert torch.equal(model(ids).logits, before)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)


def test_a_model_that_writes_to_its_input_between_them_is_tiled_unfused() -> None:
    model, ids = packed(written), torch.randint(16, (2, 5))
    before = model(ids).logits
    assert tiles.tile_checked(model) == "3 packed layers tiled, each alone (this model fused gives other logits)"
    assert type(model.mlp.gate_proj) is type(model.mlp.up_proj) is tiles.TiledLinear
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)


def test_a_model_that_asks_for_more_stays_as_it_is() -> None:
    model = packed(lambda gate, up, x: gate(x) * up(x) + up.weight_scale.sum())
    words = tiles.tile_checked(model)
    assert words.startswith("packed layers as they are (this model does not run fused: ")
    assert type(model.mlp.up_proj) is type(model.mlp.down_proj) is qat.PackedBitLinear


def test_what_took_a_linear_layers_place_answers_for_it() -> None:
    model = packed(RULES["usual"])
    biases = [model.mlp.gate_proj.bias.clone(), model.mlp.up_proj.bias.clone()]
    tiles.tile(model)
    linear = nn.Linear(64, 16).requires_grad_(False)
    heads = [RowLinear(linear.weight, linear.bias), DigitLinear(linear, 4)]
    for layer in (model.mlp.gate_proj, model.mlp.up_proj, model.mlp.down_proj, *heads):
        assert list(layer.weight.shape) == [layer.out_features, layer.in_features]
        assert layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu" and len(layer.bias) == layer.out_features
    assert torch.equal(model.mlp.gate_proj.bias, biases[0]) and torch.equal(model.mlp.up_proj.bias, biases[1])
    with pytest.raises(ValueError, match="mlp.up_proj: the weight's values were read"):
        model.mlp.up_proj.weight.sum()
    assert HalfEmbedding(linear.weight).num_embeddings == 16
