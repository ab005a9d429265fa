"""Norms that a pretrained model has not had: fitted to its text, or blended in from none of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compensation import WINDOWS, logits, pair
from tiny import SIZES
from transformers import GPT2Config, LlamaConfig

import qat
from qat.calibration.norms import RIDGE, Inputs, calibrate_norms
from qat.config import DataConfig, DistillConfig, ExportConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, TrainerConfig
from qat.conversion.layers import bitlinears, packed_layers, set_lambda, set_norm_blend
from qat.formats.contents import read
from qat.formats.packed.folder import load
from qat.metrics.agreement import relative_error
from qat.nn.bitlinear import BitLinear
from qat.train import run

NORMED = {"rms_norm_eps": 1e-6}


def test_gains_and_weights_are_those_of_least_squares() -> None:
    layer = BitLinear(6, 4, config=qat.QuantConfig(rms_norm_eps=1e-3))
    x = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([0.1, 1, 2, 3, 4, 0.0])
    inputs = Inputs(layer)
    inputs.add(x[:20].view(2, 10, 6))
    inputs.add(x[20:])
    u = x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    gains = inputs.gains()
    for k in range(5):
        assert gains[k].item() == pytest.approx(torch.linalg.lstsq(u[:, k : k + 1], x[:, k : k + 1]).solution.item())
    assert gains[5] == 1 and inputs.tokens == 50
    weight = inputs.weight(gains).requires_grad_()
    normed, latent = u * gains, layer.weight.detach().double()
    ridge = RIDGE * (normed.T @ normed).diagonal().mean()
    loss = (normed @ weight.T - x @ latent.T).square().sum() + ridge * (weight - latent).square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-9 * loss.item() + 1e-9  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "config", [LlamaConfig(**SIZES), GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64)]
)
def test_the_function_is_nearly_kept(config: Any) -> None:
    base, model = pair(config, **NORMED, rms_norm_start="calibrated")
    wanted, errors = logits(base), []
    for calibrate in (False, True):
        facts = calibrate_norms(base, model, WINDOWS) if calibrate else {}
        set_lambda(model, 0.0)
        errors.append(relative_error(logits(model), wanted))
        set_lambda(model, 1.0)
    assert errors[1] < 0.9 * errors[0]
    assert facts["norms"] == len(list(bitlinears(model))) and facts["norms_unseen"] == 0 and facts["tokens"] == 640
    assert torch.equal(logits(base), wanted)
    trained = logits(model)
    qat.pack(model)
    assert torch.equal(logits(model), trained)


def test_a_blended_norm_is_none_at_first_and_all_of_it_at_last() -> None:
    _, model = pair(LlamaConfig(**SIZES), **NORMED, rms_norm_start="blended")
    _, without = pair(LlamaConfig(**SIZES))
    _, naive = pair(LlamaConfig(**SIZES), **NORMED)
    assert torch.equal(logits(model), logits(without))
    with pytest.raises(ValueError, match=r"still blends its norm in \(blend=0\); set_norm_blend\(1\) first"):
        qat.pack(model)
    set_norm_blend(model, 1.0)
    assert torch.equal(logits(model), logits(naive))
    qat.pack(model), qat.pack(naive)
    assert torch.equal(logits(model), logits(naive))


def test_half_of_a_norm_by_value_and_gradient() -> None:
    layer = BitLinear(6, 4, config=qat.QuantConfig(rms_norm_eps=1e-6))
    assert layer.rms_norm is not None
    x = torch.randn(3, 6, requires_grad=True)
    normed = layer.rms_norm(x)
    layer.rms_norm.set_blend(0.25)
    half = layer.rms_norm(x)
    assert torch.allclose(half, 0.75 * x + 0.25 * normed)
    (a,), (b,) = (torch.autograd.grad(one.square().sum(), x) for one in (half, 0.75 * x + 0.25 * layer_norm(layer, x)))
    assert torch.allclose(a, b)
    with pytest.raises(ValueError, match=r"blend=1.5 is not allowed"):
        layer.rms_norm.set_blend(1.5)


def layer_norm(layer: BitLinear, x: torch.Tensor) -> torch.Tensor:
    layer.rms_norm.set_blend(1)  # type: ignore[union-attr]
    return layer.rms_norm(x)  # type: ignore[misc]


@pytest.fixture
def config(tiny_model: Path, text_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=str(tiny_model), start_tokens=256),
        quant=qat.QuantConfig(**NORMED),  # type: ignore[arg-type]
        data=DataConfig(train=str(text_file), sequence_length=32, batch_size=2, valid_fraction=0.1),
        distill=DistillConfig(ce=1.0, kl=0.0),
        optim=OptimConfig(lr=5e-3),
        trainer=TrainerConfig(max_steps=6, accelerator="cpu", progress=False, threads=1),
        export=ExportConfig(formats=[]),
        run=RunConfig(name="tiny", dir=str(tmp_path / "run")),
    )


def packed_folder(result: Any) -> Path:
    return Path(result.folder) / "packed"


@pytest.mark.parametrize("start", ["calibrated", "blended"])
def test_a_run_is_packed_as_it_was_trained(config: TrainConfig, start: str) -> None:
    config.quant = replace(config.quant, rms_norm_start=start)
    config.optim = replace(config.optim, rms_norm_steps=4 if start == "blended" else 0)
    result = run(config)
    assert result.verification["packed_max_logit_difference"] == 0 and result.perplexity["packed"] == result.perplexity["trained"]
    assert result.calibration.get("norms") == (14 if start == "calibrated" else None)
    manifest = json.loads((packed_folder(result) / "config.json").read_text())["quantization_config"]["quant"]
    assert manifest["rms_norm_eps"] == 1e-6 and "rms_norm_start" not in manifest


@pytest.mark.parametrize(
    ("quant", "optim", "model", "words"),
    [
        ({"rms_norm_start": "blended"}, {}, {}, "blended needs optim.rms_norm_steps above 0"),
        ({}, {"rms_norm_steps": 3}, {}, "blended and optim.rms_norm_steps are set together"),
        ({"rms_norm_start": "blended"}, {"rms_norm_steps": 7}, {}, "rms_norm_steps=7 is above trainer.max_steps=6"),
        ({"rms_norm_start": "calibrated"}, {}, {"start": "ptq"}, "does not fit model.start=ptq"),
    ],
)
def test_what_does_not_combine(config: TrainConfig, quant: Any, optim: Any, model: Any, words: str) -> None:
    config.quant, config.optim = replace(config.quant, **quant), replace(config.optim, **optim)
    config.model = replace(config.model, **model)
    with pytest.raises(ValueError, match=words):
        config.check()


SOME = {"*.o_proj": NORMED, "*.down_proj": NORMED}


def test_some_layers_have_norms(config: TrainConfig) -> None:
    config.quant = qat.QuantConfig(overrides=SOME, rms_norm_start="calibrated")
    result = run(config)
    assert result.calibration["norms"] == 4 and result.verification["packed_max_logit_difference"] == 0
    normed = [name for name, layer in packed_layers(load(packed_folder(result))).items() if layer.rms_norm is not None]
    assert len(normed) == 4 and all(name.endswith(("o_proj", "down_proj")) for name in normed)
    assert "in 4 of 14 layers" in read(packed_folder(result)).facts["activations"]


def test_a_start_needs_norms(config: TrainConfig) -> None:
    config.quant = qat.QuantConfig(rms_norm_start="calibrated")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for refused in (config.check, lambda: qat.convert(model, config.quant)):
        with pytest.raises(ValueError, match="quant.rms_norm_start=calibrated needs norms: set quant.rms_norm_eps"):
            refused()
    with pytest.raises(ValueError, match="choose one of ones, calibrated, blended"):
        qat.QuantConfig(rms_norm_eps=1e-6, rms_norm_start="zeros")
