"""Quantizers against the golden values of the papers and against independent numpy references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qat import QuantConfig
from qat.ops.options import weight_options
from qat.quantizers import latent
from qat.quantizers.activations import quantize_activation
from qat.quantizers.record import WeightOptions
from qat.quantizers.scales import dequantize_weight, scale_shape
from qat.quantizers.ste import mix

GOLDEN = torch.tensor([[-0.1, 1.9], [0.0, 0.5]])
GROUP = 4
CASES = [
    QuantConfig(weight=weight, scale=scale, granularity=granularity, group_size=GROUP if granularity == "group" else None)
    for weight, scale in [("ternary", "absmean"), ("ternary", "absmax"), ("ternary", "absmedian"), ("binary", "absmean")]
    for granularity in ("tensor", "channel", "group")
]


def quantize(w: torch.Tensor, config: QuantConfig | None = None, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    c = config or QuantConfig(**changes)
    return latent.quantize_weight(w, WeightOptions(*weight_options(c)))


def numpy_quantize(w: torch.Tensor, c: QuantConfig) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, K] and scales [R, 1] in float64; the lower of two middle values is torch's median."""
    rows = w.double().numpy().reshape({"tensor": (1, -1), "channel": (len(w), -1), "group": (-1, GROUP)}[c.granularity])
    lower_median = np.sort(abs(rows), 1)[:, (rows.shape[1] - 1) // 2]
    scale = {"absmean": abs(rows).mean(1), "absmax": abs(rows).max(1), "absmedian": lower_median}[c.scale]
    scale = np.maximum(scale, c.eps)[:, None]
    centred = rows - rows.mean(1, keepdims=True)
    codes = np.rint(rows / scale).clip(-1, 1) if c.weight == "ternary" else np.where(centred > 0, 1, -1)
    return codes.reshape(w.shape), scale


@pytest.mark.parametrize(
    ("weight", "codes"), [("ternary", [[0, 1], [0, 1]]), ("binary", [[-1, 1], [-1, -1]])], ids=["ternary", "binary"]
)
def test_golden_codes_share_the_uncentred_absmean(weight: str, codes: list[list[int]]) -> None:
    t, scale = quantize(GOLDEN, weight=weight)
    assert t.dtype == torch.int8 and t.tolist() == codes
    assert scale.dtype == torch.float32 and scale.shape == (1, 1)
    assert scale.item() == pytest.approx(0.625, rel=1e-6)


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.weight}-{c.scale}-{c.granularity}")
def test_every_scheme_equals_numpy(config: QuantConfig) -> None:
    w = torch.randn(6, 12) + 0.2
    t, scale = quantize(w, config)
    codes, value = numpy_quantize(w, config)
    np.testing.assert_array_equal(t.numpy(), codes)
    np.testing.assert_allclose(scale.numpy().reshape(-1, 1), value, rtol=2e-6)
    assert scale.shape == scale_shape(6, 12, config.granularity, config.group_size)


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.weight}-{c.scale}-{c.granularity}")
def test_dequantized_weight_is_code_times_its_own_scale(config: QuantConfig) -> None:
    t, scale = quantize(torch.randn(6, 12), config)
    repeats = (6 // scale.shape[0], 12 // scale.shape[1])
    expected = t.numpy() * np.kron(scale.numpy(), np.ones(repeats, dtype=np.float32))
    np.testing.assert_array_equal(dequantize_weight(t, scale).numpy(), expected)


def test_ternary_ties_round_half_to_even() -> None:
    t, scale = quantize(torch.tensor([[1.0, 0.5, -0.5, 0.50001, -0.50001]]), scale="absmax")
    assert scale.item() == 1 and t.tolist() == [[1, 0, 0, 1, -1]]


def test_activation_ties_round_half_to_even() -> None:
    codes, scale = quantize_activation(torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -127]), "token", 1e-5)
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, -127] and scale.item() == 1


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_zero_weights_give_zero_codes_and_the_eps_scale(granularity: str) -> None:
    group = 4 if granularity == "group" else None
    t, scale = quantize(torch.zeros(3, 8), granularity=granularity, group_size=group, eps=1e-3)
    assert not t.any() and torch.equal(scale, torch.full_like(scale, 1e-3))


def test_binary_zero_row_gives_minus_one_times_eps() -> None:
    t, scale = quantize(torch.zeros(1, 4), weight="binary", granularity="channel")
    assert t.tolist() == [[-1] * 4] and scale.item() == pytest.approx(1e-5)


def test_one_zero_row_leaves_the_others_alone() -> None:
    w = torch.randn(3, 8)
    expected = quantize(w, granularity="channel")
    w[1] = 0
    t, scale = quantize(w, granularity="channel")
    assert torch.equal(t[::2], expected[0][::2]) and torch.equal(scale[::2], expected[1][::2])
    assert not t[1].any() and scale[1].item() == pytest.approx(1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    w, x = (torch.randn(8, 256) * 300).to(dtype), (torch.randn(8, 256) * 300).to(dtype)
    for half, full in zip(quantize(w), quantize(w.float()), strict=True):
        assert torch.equal(half, full)
    for half, full in zip(quantize_activation(x, "token", 1e-5), quantize_activation(x.float(), "token", 1e-5), strict=True):
        assert torch.equal(half, full)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_codes_are_taken_with_the_rounded_scale(name: str) -> None:
    dtype, w = getattr(torch, name), torch.randn(64, 64)
    t, scale = quantize(w, scale_dtype=name)
    rounded = w.abs().mean().to(dtype).float()
    assert scale.dtype == torch.float32 and scale.item() == rounded.item() != w.abs().mean().item()
    assert torch.equal(t, (w / rounded).round().clamp(-1, 1).to(torch.int8))


@pytest.mark.parametrize(("value", "eps"), [(0.0, 1e-9), (1e-9, 1e-9), (1e6, 1e-5)], ids=["zero", "tiny", "huge"])
def test_a_float16_scale_never_becomes_zero_or_infinite(value: float, eps: float) -> None:
    t, scale = quantize(torch.full((2, 4), value), scale_dtype="float16", eps=eps)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert t.unique().tolist() == [1 if value > 1 else 0]


def test_nan_weights_do_not_pass_as_numbers() -> None:
    assert quantize(torch.tensor([[1.0, float("nan")]]))[1].isnan().all()


def test_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="in_features=10 is not a multiple of quant.group_size=4; choose a divisor"):
        quantize(torch.randn(2, 10), granularity="group", group_size=4)


@pytest.mark.parametrize("w", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(2, 2, dtype=torch.int8)])
def test_what_is_not_a_float_matrix_is_refused(w: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="w must be a floating-point matrix"):
        quantize(w)


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 4, 5)])
def test_activation_per_token_equals_numpy(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    codes, scale = quantize_activation(x, "token", 1e-5)
    absmax = abs(x.numpy()).max(-1, keepdims=True)
    np.testing.assert_array_equal(codes.numpy(), np.rint(x.numpy() * (np.float32(127) / absmax)))
    np.testing.assert_allclose(scale.numpy(), absmax / 127, rtol=1e-6)
    assert codes.dtype == torch.int8 and scale.shape == (*shape[:-1], 1)


def test_activation_per_tensor_has_one_value_in_every_row() -> None:
    x = torch.randn(3, 5)
    codes, scale = quantize_activation(x, "tensor", 1e-5)
    assert scale.shape == (3, 1) and scale.unique().item() == pytest.approx(x.abs().max().item() / 127)
    assert torch.equal(codes, (x * (127 / x.abs().max())).round().to(torch.int8))


def test_a_zero_token_gives_zeros_and_the_eps_scale() -> None:
    x = torch.randn(3, 4)
    x[1] = 0
    codes, scale = quantize_activation(x, "token", 1e-5)
    assert not codes[1].any() and codes[0].abs().max() == 127 and scale[1].item() == pytest.approx(1e-5 / 127)


def test_tokens_below_eps_are_scaled_by_eps() -> None:
    codes, scale = quantize_activation(torch.tensor([[5e-6, -1e-6]]), "token", 1e-5)
    assert codes.tolist() == [[64, -13]] and scale.item() == pytest.approx(1e-5 / 127)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_empty_activations_keep_their_shape(shape: tuple[int, ...], granularity: str) -> None:
    codes, scale = quantize_activation(torch.zeros(shape), granularity, 1e-5)
    assert codes.shape == shape and scale.shape == (*shape[:-1], 1)


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(2, 3, dtype=torch.int32)])
def test_activations_without_a_float_dimension_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="x must be a floating-point tensor"):
        quantize_activation(x, "token", 1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_mix_interpolates_and_passes_the_gradient_through(lam: float) -> None:
    full = torch.tensor([1.0, -2.0], requires_grad=True)
    mixed = mix(full, torch.tensor([3.0, 2.0]), lam)
    mixed.backward(torch.tensor([5.0, 7.0]))
    assert mixed.tolist() == [1 + 2 * lam, -2 + 4 * lam] and full.grad.tolist() == [5, 7]
