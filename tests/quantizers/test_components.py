"""Sums of ternary matrices: the fit, the ops on every path, a packed layer, a whole model, and the formats that hold one only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import SIZES
from torch import Tensor

import qat
from qat import QuantConfig, ops
from qat.formats.bitnet import limits as hf_limits
from qat.formats.gguf import writing as gguf
from qat.formats.packed import folder as packed
from qat.ops import cpu
from qat.ops.options import training_options, weight_options
from qat.quantizers import components
from qat.quantizers.scales import dequantize_weight

GRANULARITIES = [("tensor", None), ("channel", None), ("group", 32)]
CONFIGS = [
    QuantConfig(components=k, granularity=granularity, group_size=group) for k in (2, 3) for granularity, group in GRANULARITIES
]
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value(t: Tensor, scale: Tensor, k: int) -> Tensor:
    return components.sum_components(dequantize_weight(t, scale), k)


def error(w: Tensor, config: QuantConfig) -> float:
    found = value(*ops.quantize_weight(w, config), config.components)
    return float((found - w).norm() / w.norm())


@pytest.mark.parametrize(("k", "uniform", "gaussian"), [(2, 0.111, 0.174), (3, 0.037, 0.071), (4, 0.0124, 0.031)])
def test_the_error_is_that_of_alternating_least_squares(k: int, uniform: float, gaussian: float) -> None:
    config = QuantConfig(components=k, granularity="channel")
    w = torch.rand(32, 1024, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert error(w, config) == pytest.approx(uniform, rel=0.03)
    assert error(normal(32, 1024), config) < gaussian * 1.03


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_codes_are_the_nearest_levels_and_scales_their_least_squares(config: QuantConfig) -> None:
    w, k = normal(6, 64), config.components
    t, scale = ops.quantize_weight(w, config)
    assert t.dtype == torch.int8 and t.shape == (6, 64 * k) and set(t.unique().tolist()) <= {-1, 0, 1}
    groups = {"tensor": (1, k), "channel": (6, k), "group": (6, 2 * k)}[config.granularity]
    assert scale.shape == groups and scale.dtype == torch.float32 and (scale > 0).all()
    rows = {"tensor": w.reshape(1, -1), "channel": w, "group": w.reshape(12, 32)}[config.granularity]
    scales = scale.unflatten(-1, (k, -1)).mT.reshape(-1, k)
    assert (scales.diff(dim=1) <= 0).all()
    digits = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * k)
    nearest = (rows[..., None] - (scales @ digits.T)[:, None]).abs().amin(-1)
    torch.testing.assert_close((rows - value(t, scale, k).reshape(rows.shape)).abs(), nearest, rtol=0, atol=1e-6)
    planes = t.unflatten(-1, (k, 64)).movedim(1, -1).reshape(*rows.shape, k).double()
    fitted = torch.linalg.lstsq(planes, rows.double()[..., None]).solution[..., 0]
    torch.testing.assert_close(scales.double(), fitted, rtol=1e-4, atol=1e-5)


def test_rows_without_a_fit() -> None:
    config = QuantConfig(components=2, granularity="channel")
    w = torch.stack([torch.zeros(8), torch.full((8,), 0.5), torch.tensor([0.0] * 7 + [3.0])])
    t, scale = ops.quantize_weight(w, config)
    torch.testing.assert_close(value(t, scale, 2), w, rtol=0, atol=2e-5)
    assert torch.isfinite(scale).all() and (scale >= config.eps).all()
    t, scale = ops.quantize_weight(torch.zeros(0, 8), config)
    assert t.shape == (0, 16) and scale.shape == (0, 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_rounded_before_codes_are_taken(dtype: str) -> None:
    _, scale = ops.quantize_weight(normal(6, 64), QuantConfig(components=2, granularity="channel", scale_dtype=dtype))
    assert torch.equal(scale, scale.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("act_bits", [8, None])
def test_the_linear_and_its_gradients(config: QuantConfig, act_bits: int | None) -> None:
    config = QuantConfig(**{**vars(config), "act_bits": act_bits})
    x, w, bias = normal(2, 5, 64).requires_grad_(), normal(7, 64, seed=1).requires_grad_(), normal(7, seed=2).requires_grad_()
    y = ops.bitlinear(x, w, bias, config)
    seen = x.detach()
    if act_bits:
        codes, scale = ops.quantize_activation(seen)
        seen = codes * scale
    dense = value(*ops.quantize_weight(w.detach(), config), config.components)
    torch.testing.assert_close(y, F.linear(seen, dense, bias), rtol=1e-5, atol=1e-5)
    grad = normal(2, 5, 7, seed=3)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad, grad.reshape(-1, 7).T @ seen.reshape(-1, 64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["2bit", "base3"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_kernels_equal_the_reference_and_packed_equals_trained(config: QuantConfig, layout: str) -> None:
    reference = QuantConfig(**{**vars(config), "kernels": "reference"})
    x = normal(3, 64)
    layer = qat.BitLinear(64, 9, config=config)
    other = qat.BitLinear(64, 9, config=reference)
    other.load_state_dict(layer.state_dict())
    y, expected = layer(x), other(x)
    assert torch.equal(y, expected)
    for each, packing in ((layer, qat.PackedBitLinear.from_bitlinear(layer, layout)), (other, None)):
        packing = packing or qat.PackedBitLinear.from_bitlinear(each, layout)
        assert torch.equal(packing(x), expected) and torch.equal(packing(x[0]), expected[0])
        torch.testing.assert_close(packing(x.bfloat16()), each(x.bfloat16()), rtol=0, atol=0)
        assert packing.packed.shape[1] == -(-64 * config.components // (4 if layout == "2bit" else 5))


def test_the_codes_saved_for_the_backward_pass_are_two_bits_each() -> None:
    config = QuantConfig(components=3)
    _, x_q, x_scale, codes, _ = torch.ops.qat.bitlinear(normal(4, 32), normal(5, 32), None, [], *training_options(config))
    assert x_q.shape == (4, 32) and x_q.dtype == torch.int8 and x_scale.shape == (4, 1)
    assert codes.shape == (5, 24) and codes.dtype == torch.uint8


def test_opcheck_and_compile() -> None:
    config = QuantConfig(components=2, granularity="channel")
    w = normal(6, 20).requires_grad_()
    torch.library.opcheck(torch.ops.qat.quantize_weight.default, (w.detach(), [], *weight_options(config)))
    torch.library.opcheck(
        torch.ops.qat.bitlinear.default, (normal(3, 20).requires_grad_(), w, None, [], *training_options(config))
    )
    layer = qat.PackedBitLinear.from_bitlinear(qat.BitLinear(20, 6, config=config))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = normal(3, 20)
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": 5}, r"quant.components=5 is not allowed; choose one of 1, 2, 3, 4"),
        ({"components": 2.0}, r"quant.components=2.0 is not allowed"),
        ({"weight": "binary"}, "quant.weight=binary does not fit quant.components=2: components are ternary"),
        ({"scale": "absmax"}, "quant.scale=absmax does not fit quant.components=2"),
        ({"backward": "int8"}, "quant.backward=int8 does not fit quant.components=2"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(**{"components": 2, **options})  # type: ignore[arg-type]


def test_a_wrong_width_is_named_as_the_user_gave_it() -> None:
    layer = qat.PackedBitLinear.from_bitlinear(qat.BitLinear(20, 6, config=QuantConfig(components=2)))
    with pytest.raises(ValueError, match="x has 21 features in its last dimension, but the layer has in_features=20"):
        layer(normal(3, 21))


def small_model(config: QuantConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SIZES, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96})
    ).eval()
    qat.convert(model, config)
    return model


def test_a_model_trains_packs_and_is_read_back(tmp_path: Path) -> None:
    model = small_model(QuantConfig(components=2, granularity="channel"))
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if "proj" in name)
    expected = model(input_ids=IDS).logits.detach()
    qat.pack(model, layout="base3")
    assert torch.equal(model(input_ids=IDS).logits, expected)
    packed.save(model, tmp_path / "packed")
    assert torch.equal(packed.load(tmp_path / "packed")(input_ids=IDS).logits, expected)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(input_ids=IDS).logits, expected)
    assert "quant.components=2; the format holds one ternary matrix a layer" in str(hf_limits.unsupported(model))
    assert "is a sum of 2 ternary matrices" in str(gguf.unsupported(model))
    qat.unpack(model)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    found = model(input_ids=IDS).logits.detach()
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_lambda_blends_the_sum() -> None:
    layer = qat.BitLinear(32, 5, bias=False, config=QuantConfig(components=2, act_bits=None))
    full, x = layer.weight.detach().clone(), normal(3, 32)
    quantized = F.linear(x, value(*ops.quantize_weight(full, layer.config), 2))
    layer.set_lambda(0.25)
    torch.testing.assert_close(layer(x), 0.75 * F.linear(x, full) + 0.25 * quantized, rtol=1e-5, atol=1e-5)


def test_tiles_for_generation() -> None:
    from qat.inference import tiles as inference

    if not cpu.compiled():
        pytest.skip("no compiled CPU kernels")
    model = small_model(QuantConfig(components=2))
    qat.pack(model)
    expected = model(input_ids=IDS).logits
    assert inference.tile(model) == 14
    assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_autocast_changes_no_code(config: QuantConfig) -> None:
    w = normal(9, 64)
    expected = ops.quantize_weight(w, config)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.quantize_weight(w, config)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_state_of_other_components_is_refused() -> None:
    one, two = (qat.PackedBitLinear.from_bitlinear(qat.BitLinear(20, 6, config=QuantConfig(components=k))) for k in (1, 2))
    with pytest.raises(ValueError, match="was saved with layout 2bit, in_features=20, but this layer has .*, components=2"):
        two.load_state_dict(one.state_dict())


def test_what_is_said_of_it(tmp_path: Path) -> None:
    from qat.inspect import inspect
    from qat.reporting.estimate import linear_bytes

    model = small_model(QuantConfig(components=2, granularity="channel"))
    assert "2 ternary components, least squares per channel" in repr(model)
    assert "is a sum of 2 ternary matrices" in str(gguf.unsupported(model))
    full, codes = linear_bytes(model, "2bit")
    qat.pack(model)
    packed.save(model, tmp_path / "packed")
    found = inspect(tmp_path / "packed")
    assert found["weights"] == full // 2 and codes == full // 4
    assert 4 < found["bits per weight"] < 6 and "2 ternary components, least squares" in found["convention"]


def test_a_norm_does_not_widen_an_input_by_broadcasting() -> None:
    layer = qat.BitLinear(20, 6, config=QuantConfig(rms_norm_eps=1e-6))
    for module in (layer, qat.PackedBitLinear.from_bitlinear(layer)):
        with pytest.raises(ValueError, match="x has 1 features in its last dimension, but the layer has in_features=20"):
            module(normal(3, 1))
