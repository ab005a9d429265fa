"""Scales of components that are parameters: levels and codes, their gradient, their signs and order, and a step without a fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny import SIZES
from torch import Tensor

import qat
from qat import BitLinear, PackedBitLinear, QuantConfig, ops
from qat.config import OptimConfig
from qat.conversion.record import Conversion
from qat.formats.packed import folder as packed
from qat.quantizers import components
from qat.training.gradients.groups import parameter_groups

GRANULARITIES = [("tensor", None), ("channel", None), ("group", 32)]


def learned(components: int = 2, granularity: str = "channel", group_size: int | None = None, **options: object) -> QuantConfig:
    keys = {"components": components, "granularity": granularity, "group_size": group_size, **options}
    return QuantConfig(component_scales="learned", **keys)  # type: ignore[arg-type]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("granularity", "group"), GRANULARITIES)
@pytest.mark.parametrize("k", [2, 3])
def test_they_start_as_the_fit(k: int, granularity: str, group: int | None) -> None:
    layer = BitLinear(64, 6, config=learned(k, granularity, group))
    fitted = QuantConfig(components=k, granularity=granularity, group_size=group)
    for found, expected in zip(layer.quantized(), ops.quantize_weight(layer.weight, fitted), strict=True):
        assert torch.equal(found, expected)
    assert layer.component_scales.shape == layer.quantized()[1].shape


def test_levels_and_borders() -> None:
    scale = torch.tensor([[3.0, 1.0], [1.0, 0.75]])
    expected = [[-4, -3, -2, -1, 0, 1, 2, 3, 4], [-1.75, -1, -0.75, -0.25, 0, 0.25, 0.75, 1, 1.75]]
    levels, borders = components.soft(scale, scale)
    assert levels.tolist() == expected
    assert borders[1].tolist() == [-1.375, -0.875, -0.5, -0.125, 0.125, 0.5, 0.875, 1.375]
    same, book = components.code_book(scale)
    assert torch.equal(borders, same) and book.dtype == torch.int8
    assert torch.equal((book * scale[:, None]).sum(-1), torch.tensor(expected))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_codes_are_those_of_the_level_above_the_borders_below(k: int) -> None:
    rows, scale = normal(5, 40), normal(5, k, seed=1).abs()
    borders, book = components.code_book(scale)
    rows[:, :8] = borders[:, :8]  # a weight on a border takes the level below
    found = components.nearest_codes(rows, borders, book)
    assert found.dtype == torch.int8 and found.shape == (k, 5, 40)
    number = (borders[:, None] < rows[..., None]).sum(-1)
    assert number[:, :8].tolist() == [list(range(8))] * 5
    assert torch.equal(found, torch.stack([book[r, number[r]].T for r in range(5)], 1))


@pytest.mark.parametrize(("granularity", "group"), GRANULARITIES)
def test_the_gradient_of_a_scale_is_that_of_the_loss(granularity: str, group: int | None) -> None:
    """Finite differences of a loss linear in the weight, while no code changes."""
    layer = BitLinear(64, 4, False, learned(2, granularity, group, act_bits=None))
    x, grad = normal(3, 64), normal(3, 4, seed=1)
    (layer(x) * grad).sum().backward()
    torch.testing.assert_close(layer.weight.grad, grad.T @ x, rtol=1e-5, atol=1e-5)  # straight-through
    codes, scale = layer.quantized()
    by_row, step = layer.component_scales.detach().double(), 1e-3
    for index in [(0, 0), (-1, -1)]:
        moved = by_row.clone()
        moved[index] += step
        values = codes.double().unflatten(-1, (scale.shape[1], -1)) * (moved - by_row)[..., None]
        change = values.reshape(4, 2, 64).sum(1)
        expected = ((x.double() @ change.T) * grad).sum() / step
        assert layer.component_scales.grad[index].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_scale_that_crosses_0_comes_back() -> None:
    """The levels are the same for s and -s, so the gradient changes its sign with the parameter's."""
    layer, twin = (BitLinear(32, 3, False, learned()) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    with torch.no_grad():
        twin.component_scales[:, 1].neg_()
    x = normal(5, 32)
    assert torch.equal(layer(x), twin(x)) and (twin.quantized()[1] > 0).all()
    for each in (layer, twin):
        each(x).square().sum().backward()
    of_first, of_second = layer.component_scales.grad.unbind(1)
    assert torch.equal(twin.component_scales.grad, torch.stack([of_first, -of_second], 1)) and (of_second != 0).all()


def test_the_order_of_the_components_changes_nothing() -> None:
    layer, twin = (BitLinear(32, 3, False, learned(act_bits=None)) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    with torch.no_grad():
        twin.component_scales.copy_(layer.component_scales.flip(1))
    x = normal(5, 32)
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_scale_trained_with_is_the_one_stored(dtype: str) -> None:
    layer = BitLinear(64, 7, config=learned(scale_dtype=dtype, eps=1e-3))
    with torch.no_grad():
        layer.component_scales[0] = torch.tensor([-0.01, 1e-5])
    scale = layer.quantized()[1]
    assert torch.equal(scale, scale.to(getattr(torch, dtype)).float()) and scale.min() >= 0.99e-3
    x, deployed = normal(4, 64), PackedBitLinear.from_bitlinear(layer, "base3")
    assert torch.equal(deployed.weight_scale, scale) and torch.equal(deployed(x), layer(x))


def test_no_step_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = BitLinear(64, 7, config=learned())
    monkeypatch.setattr(components, "_fit", lambda *_: pytest.fail("a fit"))
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    before = layer.component_scales.detach().clone()
    for seed in range(3):
        optimizer.zero_grad()
        layer(normal(4, 64, seed=seed)).square().sum().backward()
        optimizer.step()
    assert (layer.component_scales != before).all()


def test_bf16_gradients() -> None:
    exact, fast = (BitLinear(64, 7, config=learned(backward=backward)) for backward in ("input", "bf16"))
    fast.load_state_dict(exact.state_dict())
    for layer in (exact, fast):
        layer(normal(9, 64)).square().sum().backward()
    found, expected = fast.component_scales.grad, exact.component_scales.grad
    assert not torch.equal(found, expected) and float((found - expected).norm() / expected.norm()) < 0.01


def test_a_model_has_them_in_its_state_and_in_a_group_without_decay(tmp_path: Path) -> None:
    def small() -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        sizes = {**SIZES, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()

    ids, model = torch.arange(24).reshape(2, 12), small()
    record = qat.convert(model, learned())
    groups = {group["name"]: group for group in parameter_groups(model, OptimConfig(lr=1e-3, weight_decay=0.1))}
    assert len(groups["quantizers"]["params"]) == 14
    assert groups["quantizers"]["lr"] == 1e-3 and groups["quantizers"]["weight_decay"] == 0
    optimizer = torch.optim.SGD([{"params": group["params"]} for group in groups.values()], 1e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    expected, again = model(input_ids=ids).logits, small()
    Conversion.from_json(record.to_json()).apply(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(input_ids=ids).logits, expected)
    qat.pack(model)
    packed.save(model, tmp_path / "packed")
    assert torch.equal(packed.load(tmp_path / "packed")(input_ids=ids).logits, expected)


def test_the_key_is_checked_and_needs_no_second_component() -> None:
    with pytest.raises(ValueError, match=r"quant.component_scales='free' is not allowed; choose one of fitted, learned"):
        QuantConfig(component_scales="free")
    assert not QuantConfig(component_scales="learned").quantizer.parameters
