"""Latent weights of given codes and scales: training starts where calibration ended."""

import copy

import pytest
import torch
from tiny import SIZES
from transformers import AutoModelForCausalLM, LlamaConfig

import qat
from qat.calibration.compensation import check_calibrated, compensate
from qat.calibration.latents import check_start, latent, start_calibrated
from qat.calibration.windows import batched, spread, windows_of

IDS = [torch.randint(32, (4, 40), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("multiplier", [1.0, 1.25, 0.8])
@pytest.mark.parametrize("quant", [{}, {"granularity": "channel"}, {"granularity": "group", "group_size": 8}])
def test_codes_and_scales_are_those_that_were_asked_for(quant, multiplier):
    config = qat.QuantConfig(**quant, scale_multiplier=multiplier)
    weight, codes = torch.randn(6, 32), torch.randint(-1, 2, (6, 32), dtype=torch.int8)
    codes[0, 8:] = 0  # few codes, which must lie far out
    shape = qat.ops.quantize_weight(weight, config)[1].shape
    scale = torch.rand(shape) + 0.5
    if quant.get("granularity") == "group":
        codes[0, 8::8] = 1
    found = latent(weight, codes, scale, config)
    again, same = qat.ops.quantize_weight(found, config)
    assert torch.equal(again, codes) and torch.allclose(same, scale, rtol=1e-5)


def test_a_weight_that_has_them_stays_near_itself():
    config, weight = qat.QuantConfig(granularity="channel"), torch.randn(16, 64)
    codes, scale = qat.ops.quantize_weight(weight, config)
    found = latent(weight, codes, scale, config)
    assert (found - weight).norm() < 0.12 * weight.norm()


def test_training_starts_with_the_calibrated_model():
    """To the scales' last bits, so the logits of both are as near as float32 sums are."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    model = copy.deepcopy(base)
    qat.convert(model, qat.QuantConfig(granularity="channel"))
    calibrated, before = copy.deepcopy(model), [p for p in model.parameters()]
    compensate(base, calibrated, IDS)
    facts = start_calibrated(base, model, IDS)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))  # whoever holds them trains them
    assert facts["tokens"] == 160 and 0 < facts["error"] < 1
    for name, layer in model.named_modules():
        if isinstance(layer, qat.BitLinear):
            assert torch.equal(layer.quantized()[0], calibrated.get_submodule(name).codes())
            assert torch.allclose(layer.quantized()[1], calibrated.get_submodule(name).weight_scale, rtol=1e-5)


@pytest.mark.parametrize("quant", [{"weight": "binary"}, {"components": 2}, {"scale": "absmax"}])
def test_quantizers_without_such_weights_are_refused(quant):
    with pytest.raises(ValueError, match="model.start=ptq does not fit .*use ternary with quant.scale=absmean"):
        check_start(qat.QuantConfig(**quant))


def test_quantizers_that_fit():
    for quant in ({}, {"granularity": "channel"}, {"granularity": "group", "group_size": 16}, {"scale_multiplier": 1.25}):
        check_start(qat.QuantConfig(**quant))
        check_calibrated(qat.QuantConfig(**quant))


def test_windows_are_spread_over_the_text():
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="4 windows are wanted of 3"):
        spread(3, 4)
    found = windows_of(torch.arange(103), 10, 9)
    assert [list(batch.shape) for batch in found] == [[8, 10], [1, 10]] and found[0][1, 0] == 10 and found[1][0, 0] == 80
    assert [list(batch.shape) for batch in batched([torch.zeros(3), torch.ones(3), torch.ones(2)])] == [[2, 3], [1, 2]]
