"""The ops behind BitLinear, callable on their own, traced by torch.compile and torch.export.

Each wrapper checks its arguments and calls `torch.ops.qat.<name>`; `library` holds schemas, fakes and gradients,
`reference` the pure-torch implementation. Legend: N out_features, K in_features, G groups along K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat.config import QuantConfig
from qat.ops import cpu, cuda
from qat.ops import library as library
from qat.ops.checks import cast_for_autocast as cast_for_autocast
from qat.ops.checks import check_activation, check_bias, check_device, check_input, describe, need
from qat.ops.choice import Status, why_left
from qat.ops.options import WeightOptions, training_options, weight_options
from qat.ops.shards import gathered
from qat.ops.shards.gathered import GatheredCodes
from qat.quantizers import find, latent
from qat.quantizers.layouts import get_layout

_DEFAULT = QuantConfig()
_DEVICES = {"cpu": cpu, "cuda": cuda}


def backend(config: QuantConfig | None = None) -> dict[str, dict[str, str]]:
    """Which kernels serve which device, and why: {"cpu": {"kernels": ..., "why": ...}, ...}. Builds them if need be.

    With a configuration: which train its layers there, since a device's kernels need not know every quantizer.
    """
    found = {"cpu": cpu.status()}
    if torch.cuda.is_available():
        found["cuda"] = cuda.status()
    if config is not None:
        served = {device: _DEVICES[device].serves(config.quantizer) for device in found}
        left = {device: Status("reference", why_left(device, _DEVICES[device].serves)) for device in found}
        found = {device: status if served[device] else left[device] for device, status in found.items()}
    return {device: {"kernels": status.kernels, "why": status.why} for device, status in found.items()}


@torch.compiler.assume_constant_result
def check_kernels(kernels: str, device: str | None = None) -> None:
    """Raise ValueError when `quant.kernels=compiled` cannot be honoured on the device, or on none of all if None."""
    if kernels != "compiled" or device == "meta" or (device == "cpu" and cpu.compiled()):  # a layer asks at every call
        return
    found = {name: status for name, status in backend().items() if name == (device or name)}
    reasons = "; ".join(f"{name} has none: {status['why']}" for name, status in found.items())
    compiled = any(status["kernels"] == "compiled" for status in found.values())
    need(compiled, lambda: f"quant.kernels=compiled, but {reasons or f'there are none for {device}'}; use auto or reference")


@torch.compiler.assume_constant_result
def check_quantizer(weight: str, planes: int = 1, component_scales: str = "fitted", device: str | None = None) -> None:
    """Raise ValueError when no compiled kernels, of the device or of any if None, serve that quantizer."""
    record = find(weight, planes, component_scales)
    asked = {name: kernels for name, kernels in _DEVICES.items() if name == (device or name)}
    if record is None or not asked or any(kernels.serves(record) for kernels in asked.values()):
        return
    why = "; ".join(why_left(name, kernels.serves) for name, kernels in asked.items())
    raise ValueError(f"quant.kernels=compiled does not fit quant.weight={weight}: {why}; use auto or reference")


def check_config(config: QuantConfig) -> None:
    """Raise ValueError when `quant.kernels=compiled` cannot be honoured for a layer of this configuration on any device."""
    check_kernels(config.kernels)
    if config.kernels == "compiled":
        check_quantizer(config.weight, config.planes, config.component_scales)


def pick(name: str, kernels: str, x: Tensor) -> Any:
    """The op of that name, or its pure-torch twin."""
    if kernels == "auto":
        return getattr(torch.ops.qat, name)
    need(
        kernels in ("compiled", "reference"),
        lambda: f"kernels={kernels!r} is not allowed; choose one of auto, compiled, reference",
    )
    if kernels == "reference":
        return getattr(torch.ops.qat, name + "_reference")
    check_kernels(kernels, x.device.type)
    return getattr(torch.ops.qat, name)


def quantize_activation(x: Tensor, granularity: str = "token", eps: float = 1e-5, kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """int8 codes [..., K] and float32 scale [..., 1] with x ~ x_q * scale (BitNet b1.58, arXiv:2402.17764, section 2).

    Args:
        x: floating point [..., K].
        granularity: `token` (one scale a row) or `tensor` (the same scale in every row).
        eps: lower bound of max|x|; an all-zero row gives zeros.
        kernels: `auto`, `compiled` or `reference`.

    Raises:
        ValueError: x is not floating point or has no dimension; unknown granularity.
    """
    need(x.is_floating_point() and x.ndim >= 1, lambda: f"x must be a floating-point tensor [..., K], not {describe(x)}")
    check_activation("granularity", granularity, eps)
    return pick("quantize_activation", kernels, x)(x, granularity, eps)


def check_weight(w: Tensor, config: QuantConfig) -> None:
    """ValueError unless w is a floating-point matrix that the configuration fits."""
    if config.kernels == "compiled":
        check_quantizer(config.weight, config.planes, config.component_scales, w.device.type)
    need(w.is_floating_point() and w.ndim == 2, lambda: f"weight must be a floating-point matrix [N, K], not {describe(w)}")
    group = config.group_size
    need(
        group is None or w.shape[1] % group == 0,
        lambda: f"in_features={w.shape[1]} is not a multiple of quant.group_size={group}; choose a divisor, or exclude the layer",
    )


def quantize_weight(
    w: Tensor, config: QuantConfig = _DEFAULT, parameters: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """int8 codes t [N, K] and float32 scale [1 | N, 1 | K / group_size] with w ~ t * scale.

    With config.planes > 1 both are wider by that factor, the planes side by side (`qat.quantizers.components`).

    Args:
        w: floating point [N, K].
        config: how; its quantizer's record says what codes there are.
        parameters: the record's, in its order (`BitLinear.quantizer_parameters`); None: as they start for this weight.

    Raises:
        ValueError: w is not a floating-point matrix; K is not a multiple of the group size; kernels=compiled, but none serve.
    """
    check_weight(w, config)
    return pick("quantize_weight", config.kernels, w)(w, parameters_of(w, config, parameters), *weight_options(config))


def fake_quantize(w: Tensor, config: QuantConfig = _DEFAULT, parameters: Sequence[Tensor] | None = None) -> Tensor:
    """The weight [N, K] in w's dtype that codes and scales stand for, with the quantizer's gradient: for warm-ups."""
    check_weight(w, config)
    return pick("fake_quantize", config.kernels, w)(w, parameters_of(w, config, parameters), *weight_options(config))[0]


def parameters_of(w: Tensor, config: QuantConfig, given: Sequence[Tensor] | None) -> list[Tensor]:
    """The quantizer's parameters as given, or as they start for this weight."""
    if given is not None:
        _check_parameters(w, given)
        return list(given)
    return list(initial_parameters(w, config).values()) if config.quantizer.parameters else []


def _check_parameters(w: Tensor, given: Sequence[Tensor]) -> None:
    for i, value in enumerate(given):
        if value.device != w.device:
            raise ValueError(f"parameters[{i}] is on {value.device}, but the weight is on {w.device}")


def initial_parameters(w: Tensor, config: QuantConfig) -> dict[str, Tensor]:
    """What the parameters of the quantizer start with for this weight: float32 by name, shaped as the scale or [1]."""
    return latent.initial_parameters(w, WeightOptions(*weight_options(config)))


def pack_ternary(t: Tensor, layout: str = "2bit") -> Tensor:
    """Codes t [N, K] in {-1, 0, 1} as bytes uint8 [N, ceil(K / 4)] (`2bit`), [N, ceil(K / 5)] (`base3`) or
    [N, ceil(5 K / 32)] (`sparse`, of exactly one 0 in four).

    Raises:
        ValueError: unknown layout; t is not an integer matrix; a value outside {-1, 0, 1}, or codes that do not fit the layout.
    """
    get_layout(layout)
    return torch.ops.qat.pack_ternary(t, layout)


def unpack_ternary(packed: Tensor, k: int, layout: str = "2bit") -> Tensor:
    """Codes int8 [N, k] of packed bytes; the inverse of `pack_ternary`.

    Raises:
        ValueError: unknown layout; wrong dtype or length; a byte that holds no ternary codes.
    """
    get_layout(layout)
    return torch.ops.qat.unpack_ternary(packed, k, layout)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    in_features: int,
    layout: str = "2bit",
    act_bits: int | None = 8,
    act_granularity: str = "token",
    eps: float = 1e-5,
    kernels: str = "auto",
) -> Tensor:
    """One call for: quantize x to int8, integer matmul with packed codes, rescale, add bias.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        packed: uint8 [N, bytes of a row], as `pack_ternary` gives it.
        scale: float32 [1 | N, 1 | G], multiplies.
        bias: [N], added after rescaling.
        in_features: K.
        layout: `2bit`, `base3` or `sparse`.
        act_bits: 8, or None to leave x in floating point (always in pure torch).
        kernels: `auto`, `compiled` or `reference`.

    Returns:
        [..., N] in x's dtype. Differentiable in x and bias.

    Raises:
        ValueError: a wrong dtype, shape, device or layout, with the argument's name and what was expected.
    """
    row_bytes = get_layout(layout).row_bytes(in_features)
    check_input(x, in_features)
    need(
        packed.dtype == torch.uint8 and packed.ndim == 2 and packed.shape[1] == row_bytes,
        lambda: f"packed must be uint8 [N, {row_bytes}] for in_features={in_features} in layout {layout}, not {describe(packed)}",
    )
    n = packed.shape[0]
    fits = scale.ndim == 2 and scale.shape[0] in (1, n) and scale.shape[1] >= 1 and in_features % scale.shape[1] == 0
    need(
        scale.dtype == torch.float32 and fits,
        lambda: f"scale must be float32 [1 | {n}, 1 | groups dividing {in_features}], not {describe(scale)}",
    )
    check_bias(bias, n)
    need(act_bits in (8, None), lambda: f"act_bits={act_bits!r} is not allowed; choose 8 or None")
    check_activation("act_granularity", act_granularity, eps)
    check_device(x, packed=packed, scale=scale, bias=bias)
    return pick("packed_linear", kernels, x)(x, packed, scale, bias, in_features, layout, act_bits, act_granularity, eps)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, config: QuantConfig) -> None:
    """ValueError unless x [..., K], weight [N, K] and bias [N] fit one another and the configuration."""
    check_weight(weight, config)
    check_input(x, weight.shape[1])
    check_bias(bias, weight.shape[0])
    check_device(x, weight=weight, bias=bias)


def bitlinear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    config: QuantConfig = _DEFAULT,
    parameters: Sequence[Tensor] | None = None,
) -> Tensor:
    """The training linear: quantize x [..., K] and the latent weight [N, K], integer matmul, rescale, add bias.

    Backward on the quantized operands, then the quantizer's own gradient, straight-through where its record has none; codes
    are saved instead of floats, int8 of x and 2 bits each of the weight. Under autocast x is cast to the autocast dtype; the
    latent weight is always quantized from its own precision. `parameters` are the quantizer's, see `quantize_weight`; they
    get gradients too.

    Returns:
        [..., N] in x's dtype (autocast's, under autocast).

    Raises:
        ValueError: a wrong dtype, shape or device, with the argument's name and what was expected.
    """
    if isinstance(weight, GatheredCodes):
        return gathered.linear(x, weight, bias, config, pick("coded_bitlinear", config.kernels, x))
    check_linear(x, weight, bias, config)
    x = cast_for_autocast(x)
    op = pick("bitlinear", config.kernels, x)
    return op(x, weight, bias, parameters_of(weight, config, parameters), *training_options(config))[0]
