"""Inputs of 4 bits, and rotated ones: by value and gradient, packed as trained, and what cannot hold them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_model
from torch import Tensor, nn

import qat
from qat.calibration.compensation import check_calibrated
from qat.config import DataConfig, DistillConfig, ExportConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, TrainerConfig
from qat.conversion.layers import packed_layers, set_beta, set_lambda
from qat.formats.bitnet.limits import _config_reason
from qat.formats.contents import read
from qat.formats.packed.folder import load
from qat.metrics.agreement import relative_error
from qat.quantizers.activations import rounded_activation
from qat.quantizers.hadamard import block_of, rotate
from qat.train import run

FOUR = {"act_bits": 4, "act_hadamard": True}


def sylvester(order: int) -> Tensor:
    return torch.ones(1, 1) if order == 1 else torch.kron(torch.tensor([[1.0, 1], [1, -1]]), sylvester(order // 2))


@pytest.mark.parametrize(("width", "block"), [(8, 8), (12, 4), (44, 4), (6, 2), (64, 64), (576, 64)])
def test_the_rotation_is_a_block_of_sylvesters_matrix(width: int, block: int) -> None:
    assert block_of(width) == block
    x = torch.randn(2, 3, width, requires_grad=True)
    matrix = torch.block_diag(*[sylvester(block) * block**-0.5] * (width // block))
    assert torch.allclose(rotate(x), x @ matrix, atol=1e-5)
    assert torch.allclose(rotate(rotate(x)), x, atol=1e-5)
    (gradient,) = torch.autograd.grad((rotate(x) * (seen := torch.randn_like(x))).sum(), x)
    assert torch.allclose(gradient, seen @ matrix.T, atol=1e-5)


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_four_bits_by_value_and_gradient(granularity: str) -> None:
    x = torch.tensor([[0.7, -0.24, 0.26, 0.0], [7.0, -7.0, 3.4, 0.4]], requires_grad=True)
    found = rounded_activation(x, granularity, 1e-5, 4)
    expected = [[0.7, -0.2, 0.3, 0.0], [7.0, -7.0, 3.0, 0.0]]
    if granularity == "tensor":
        expected[0] = [1.0, 0.0, 0.0, 0.0]
    assert torch.allclose(found, torch.tensor(expected))
    (gradient,) = torch.autograd.grad((found * torch.arange(4.0)).sum(), x)
    assert torch.equal(gradient, torch.arange(4.0).expand(2, 4))
    assert not rounded_activation(torch.zeros(1, 4), granularity, 1e-5, 4).any()


@pytest.mark.parametrize(
    "quant", [FOUR, {"act_bits": 4}, {"act_hadamard": True}, {"act_hadamard": True, "act_bits": None}], ids=str
)
@pytest.mark.parametrize(
    "more",
    [{}, {"granularity": "channel", "components": 2, "rms_norm_eps": 1e-6}, {"granularity": "group", "group_size": 4}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_gives_what_was_trained(quant: dict[str, Any], more: dict[str, Any], dtype: torch.dtype) -> None:
    layer = qat.BitLinear(12, 6, config=qat.QuantConfig(**quant, **more), dtype=dtype)
    x = torch.randn(5, 12, dtype=dtype)
    packed = qat.PackedBitLinear.from_bitlinear(layer)
    assert torch.equal(layer(x), packed(x))
    codes, scale = layer.quantized()
    wide = layer.rms_norm(x) if layer.rms_norm is not None else x
    wide = rotate(wide) if layer.config.act_hadamard else wide
    bits = layer.config.act_bits
    wide = wide if bits is None else rounded_activation(wide, "token", 1e-5, bits)
    expected = wide.float() @ packed.dequantize().T + layer.bias.float()
    assert relative_error(packed(x).float(), expected) < (1e-5 if dtype is torch.float32 else 0.02)


def test_conversion_keeps_the_float_function_and_unpack_gives_it_back() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
    x = torch.randn(7, 12)
    model = copy.deepcopy(plain)
    qat.convert(model, qat.QuantConfig(act_hadamard=True, act_bits=None), include="*")
    set_lambda(model, 0.0)
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    set_lambda(model, 1.0)
    qat.pack(model)
    wanted = model(x)
    qat.unpack(model)
    assert torch.allclose(model(x), wanted, atol=1e-5) and type(model[0]) is nn.Linear


def test_outliers_are_kept_better_when_they_are_spread() -> None:
    x = torch.randn(64, 64)
    x[:, 3] *= 50
    plain, spread = rounded_activation(x, "token", 1e-5, 4), rotate(rounded_activation(rotate(x), "token", 1e-5, 4))
    errors = [(one - x)[:, :3].square().mean() for one in (plain, spread)]
    assert errors[1] < 0.9 * errors[0]


def test_soft_codes_and_gradients_meet_the_same_inputs() -> None:
    layer = qat.BitLinear(12, 6, config=qat.QuantConfig(**FOUR))
    x = torch.randn(5, 12, requires_grad=True)
    inner = qat.BitLinear(12, 6, config=qat.QuantConfig(act_bits=None))
    inner.load_state_dict(layer.state_dict())
    for beta in (None, 4.0):
        for one in (layer, inner):
            set_beta(one, beta)
            one.zero_grad()
        seen = rounded_activation(rotate(x), "token", 1e-5, 4)
        found, wanted = layer(x), inner(seen)
        assert torch.equal(found, wanted)
        gradients = [torch.autograd.grad(out.square().sum(), (x, one.weight)) for out, one in ((found, layer), (wanted, inner))]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_does_not_combine() -> None:
    for values, words in (
        ({"act_bits": 4, "backward": "int8"}, "quant.backward=int8 needs int8 activations .*not quant.act_bits=4"),
        ({"act_bits": 4, "kernels": "compiled"}, "quant.kernels=compiled needs quant.act_bits=8; 4-bit activations have none|no"),
        ({"act_bits": 5}, "choose one of 8, 4"),
        ({"act_hadamard": True, "budget_bits": 2.5}, "quant.budget_bits does not fit quant.act_hadamard=true"),
    ):
        with pytest.raises(ValueError, match=words):
            qat.QuantConfig(**values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quant.act_hadamard needs an even in_features, not 43"):
        qat.BitLinear(43, 4, config=qat.QuantConfig(act_hadamard=True))
    with pytest.raises(ValueError, match="inputs are rotated"):
        check_calibrated(qat.QuantConfig(act_hadamard=True))
    assert "quant.act_bits=4" in str(_config_reason(qat.QuantConfig(act_bits=4)))
    assert "does not rotate" in str(_config_reason(qat.QuantConfig(act_hadamard=True)))


@pytest.fixture
def config(text_file: Path, tmp_path: Path) -> TrainConfig:
    model = write_model(tmp_path / "even", hidden_size=32, intermediate_size=44, num_hidden_layers=1)
    return TrainConfig(
        model=ModelConfig(path=str(model), start_tokens=256),
        quant=qat.QuantConfig(**FOUR),  # type: ignore[arg-type]
        data=DataConfig(train=str(text_file), sequence_length=32, batch_size=2, valid_fraction=0.1),
        distill=DistillConfig(ce=1.0, kl=0.0),
        optim=OptimConfig(lr=5e-3, anneal="soft"),
        trainer=TrainerConfig(max_steps=5, accelerator="cpu", progress=False, threads=1),
        export=ExportConfig(formats=["pt2"]),
        run=RunConfig(name="tiny", dir=str(tmp_path / "run")),
    )


def test_a_run_is_packed_exported_and_read_back(config: TrainConfig) -> None:
    config.quant = replace(config.quant, rms_norm_eps=1e-6, rms_norm_start="calibrated")
    result = run(config)
    assert result.verification["packed_max_logit_difference"] == 0 and result.perplexity["packed"] == result.perplexity["trained"]
    assert result.perplexity["exported"] == pytest.approx(result.perplexity["packed"], rel=1e-4)
    folder = Path(result.folder) / "packed"
    assert all(layer.config.act_hadamard and layer.config.act_bits == 4 for layer in packed_layers(load(folder)).values())
    assert "int4 per token, after a Hadamard rotation" in str(read(folder).facts["activations"])


@pytest.mark.parametrize("quant", [{"act_bits": 4}, {"act_hadamard": True}])
@pytest.mark.parametrize("name", ["hf", "gguf"])
def test_exports_that_have_no_room_are_refused_before_a_run(config: TrainConfig, name: str, quant: dict[str, Any]) -> None:
    config.quant, config.export = qat.QuantConfig(**quant), ExportConfig(formats=[name])
    with pytest.raises(
        ValueError, match=rf"export.formats={name} does not fit .*inputs are .*; take pt2, or export.formats=\[\]"
    ):
        config.check()
