"""What codes and latent weights say: the same from parts as from the whole, for each form of a scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qat.config import QuantConfig
from qat.monitor import weights
from qat.monitor.weights import NEAR, weight_sums, with_borders
from qat.nn.bitlinear import BitLinear
from qat.quantizers.components import sum_components
from qat.quantizers.scales import dequantize_weight


@pytest.mark.parametrize("part", [1, 700, 1 << 16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "channel"},
        {"granularity": "group", "group_size": 16},
        {"components": 2, "granularity": "group", "group_size": 32},
        {"weight": "binary", "granularity": "channel"},
        {"weight": "twn", "granularity": "channel"},
        {"weight": "sherry"},
    ],
)
def test_sums_over_parts_are_those_of_the_whole(options: dict[str, Any], part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PART", part)
    torch.manual_seed(0)
    layer = BitLinear(96, 53, False, QuantConfig(**options))
    codes, scale = (one.detach() for one in layer.quantized())
    found = {name: (float(a), float(b)) for name, (a, b) in weight_sums(layer, codes, scale).items()}
    latent = layer.weight.detach().double()
    rest = latent - sum_components(dequantize_weight(codes, scale), layer.config.planes)
    squares = float(rest.square().sum()), float(latent.square().sum())
    assert found["zero_fraction"] == (int((codes == 0).sum()), codes.numel())
    assert found["scale"] == pytest.approx((float(scale.abs().double().sum()), scale.numel()))
    assert found["error"] == pytest.approx(squares, rel=1e-5)
    rows, scales, borders = with_borders(layer, scale)
    assert ("dead_zone" in found) == (borders is not None) == (options.get("weight") != "sherry")
    if borders is not None:
        near = ((rows[..., None] - borders[:, None]).abs() < NEAR * scales.abs().amin(1)[:, None, None]).any(-1)
        assert 0 < found["dead_zone"][0] == int(near.sum()) and found["dead_zone"][1] == 96 * 53
