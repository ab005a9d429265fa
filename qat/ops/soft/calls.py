"""The soft ops, checked: what `qat.ops` is for codes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qat import ops
from qat.config import QuantConfig
from qat.ops.options import training_options, weight_options


def soft_quantize(
    w: Tensor, beta: Tensor, config: QuantConfig, parameters: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The soft weight Q [N, K] in w's dtype, with its true gradient, and its slope dQ/dw [N, K].

    Args:
        w: floating point [N, K].
        beta: float32 [], how sharp: 2 is nearly a line, 1e4 hard codes.
        config: how; its quantizer's record says which levels there are.
        parameters: the record's, in its order; None: as they start for this weight.

    Raises:
        ValueError: w is not a floating-point matrix; K is not a multiple of the group size; the quantizer has no soft form.
    """
    ops.check_weight(w, config)
    op = ops.pick("soft_quantize", config.kernels, w)
    return op(w, beta, ops.parameters_of(w, config, parameters), w.dtype, *weight_options(config))


def soft_bitlinear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    beta: Tensor,
    config: QuantConfig,
    parameters: Sequence[Tensor] | None = None,
) -> Tensor:
    """`qat.ops.bitlinear` while the weight is soft: activations [..., K] quantized as ever, and a matmul in floating point.

    Returns:
        [..., N] in x's dtype (autocast's, under autocast).

    Raises:
        ValueError: a wrong dtype, shape or device, with the argument's name and what was expected; no soft form.
    """
    ops.check_linear(x, weight, bias, config)
    x = ops.cast_for_autocast(x)
    op = ops.pick("soft_bitlinear", config.kernels, x)
    return op(x, weight, bias, beta, ops.parameters_of(weight, config, parameters), *training_options(config))[0]
