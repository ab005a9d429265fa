"""BitLinear and PackedBitLinear, cast, copied, saved and loaded."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from qat import BitLinear, PackedBitLinear, QuantConfig


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_packed_layer_leaves_scale_and_codes_alone(dtype: torch.dtype) -> None:
    packed = PackedBitLinear.from_bitlinear(BitLinear(8, 4, config=QuantConfig(granularity="channel")))
    codes, scale = packed.packed.clone(), packed.weight_scale.clone()
    nn.Sequential(packed).to(dtype)
    assert packed.weight_scale.dtype == torch.float32 and torch.equal(packed.weight_scale, scale)
    assert torch.equal(packed.packed, codes) and packed.bias.dtype == dtype
    assert packed(torch.randn(2, 8, dtype=dtype)).dtype == dtype


def test_a_packed_layer_built_under_a_half_default_dtype_has_a_float32_scale() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert PackedBitLinear(8, 4, True, QuantConfig()).weight_scale.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save", "state_dict"])
@pytest.mark.parametrize("packed", [False, True])
def test_copies_give_the_same_output(copied: str, packed: bool) -> None:
    config = QuantConfig(granularity="group", group_size=4)
    layer: nn.Module = BitLinear(12, 5, config=config)
    fresh: nn.Module = BitLinear(12, 5, config=config)
    if packed:
        layer, fresh = PackedBitLinear.from_bitlinear(layer, "base3"), PackedBitLinear(12, 5, True, config, "base3")
    if copied == "deepcopy":
        fresh = copy.deepcopy(layer)
    elif copied == "pickle":
        fresh = pickle.loads(pickle.dumps(layer))
    elif copied == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        fresh = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        fresh.load_state_dict(layer.state_dict())
    x = torch.randn(3, 12)
    assert torch.equal(fresh(x), layer(x)) and fresh.config == config


def test_a_trained_state_dict_is_nn_linears() -> None:
    layer = BitLinear(8, 4)
    layer.set_lambda(0.5)
    nn.Linear(8, 4).load_state_dict(layer.state_dict())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("packed", torch.full((4, 2), 243, dtype=torch.uint8), r"0\.packed\[0, 0\] = 243 holds no ternary codes"),
        ("packed", torch.zeros(4, 3, dtype=torch.uint8), r"0\.packed must be uint8 \[N, 2\]"),
        ("packed", torch.zeros(4, 2), r"0\.packed must be uint8"),
        ("packed", torch.zeros(5, 2, dtype=torch.uint8), "size mismatch for 0.packed"),
        ("weight_scale", torch.tensor([[float("nan")]]), "0.weight_scale holds values that are not finite"),
        ("weight_scale", torch.tensor([[0.0]]), "0.weight_scale holds values that are not finite and above 0"),
        ("weight_scale", torch.tensor([[-1.0]]), "0.weight_scale holds"),
        ("weight_scale", torch.ones(4, 1), "size mismatch for 0.weight_scale"),
    ],
)
def test_a_corrupt_state_dict_is_refused(key: str, value: torch.Tensor, message: str) -> None:
    model = nn.Sequential(PackedBitLinear(8, 4, True, QuantConfig(), "base3"))
    with pytest.raises((ValueError, RuntimeError), match=message):
        model.load_state_dict({**model.state_dict(), f"0.{key}": value})


@pytest.mark.parametrize(("k", "layout"), [(8, "base3"), (7, "2bit")])
def test_bytes_saved_for_another_layout_or_width_are_refused(k: int, layout: str) -> None:
    file, fresh = io.BytesIO(), nn.Sequential(PackedBitLinear(k, 4, True, QuantConfig(), layout))
    torch.save(nn.Sequential(PackedBitLinear.from_bitlinear(BitLinear(8, 4))).state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    with pytest.raises(ValueError, match=r"0.packed was saved with layout 2bit, in_features=8, but this layer has layout"):
        fresh.load_state_dict(state)
