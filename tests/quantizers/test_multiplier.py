"""`quant.scale_multiplier`: the scale that is trained with, packed and said; refused where it would say nothing."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import same

from qat import BitLinear, PackedBitLinear, QuantConfig, ops
from qat.formats.packed.manifest import quant_entry


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("scale", ["absmean", "absmax"])
def test_the_scale_is_multiplied_before_codes_are_taken(kernels: str, scale: str) -> None:
    w = torch.tensor([[0.1, -0.4, 0.6, 0.9], [1.0, -1.0, 0.2, 0.0]])
    config = QuantConfig(scale=scale, granularity="channel", scale_multiplier=1.5, kernels=kernels)
    codes, found = ops.quantize_weight(w, config)
    wanted = 1.5 * (w.abs().mean(1, keepdim=True) if scale == "absmean" else w.abs().amax(1, keepdim=True))
    torch.testing.assert_close(found, wanted)
    assert torch.equal(codes, (w / wanted).round().clamp(-1, 1).to(torch.int8))


def test_packed_is_trained_and_the_words_say_it() -> None:
    config = QuantConfig(scale_multiplier=1.25)
    layer, x = BitLinear(24, 8, config=config), torch.randn(3, 24)
    packed = PackedBitLinear.from_bitlinear(layer)
    same(packed(x), layer(x))
    torch.testing.assert_close(packed.weight_scale, 1.25 * layer.weight.detach().abs().mean().reshape(1, 1))
    assert "absmean times 1.25" in repr(layer)
    assert quant_entry(config)["scale_multiplier"] == 1.25 and "scale_multiplier" not in quant_entry(QuantConfig())


def test_what_it_cannot_multiply_is_refused() -> None:
    with pytest.raises(ValueError, match="quant.scale_multiplier=1.25 does not fit quant.components=2: its scale"):
        QuantConfig(components=2, scale_multiplier=1.25)
    with pytest.raises(ValueError, match="quant.scale_multiplier=0.0 is not allowed; it must be at least 0.01"):
        QuantConfig(scale_multiplier=0.0)
