"""Which training linears one op of a GPU's serves, and how it is told of them."""

from __future__ import annotations

import torch

from qat.config import QuantConfig
from qat.ops import cuda, products
from qat.ops.fused.linear import Ops, fits
from qat.ops.options import WeightOptions, weight_options
from qat.quantizers.record import resolve


def ops_for(config: QuantConfig, weight: torch.Tensor) -> Ops | None:
    """The ops of a layer; None where others serve it: scales that no kernel takes, and devices that multiply by bfloat16."""
    n, k = weight.shape
    known = fits(config, config.quantizer) and resolve(config.quantizer.codes) in cuda._CODES
    if not known or n * k == 0 or not cuda._serves(weight, k) or products.preferred(weight):
        return None
    options = WeightOptions(*weight_options(config))
    if cuda.reduction_of(options) is None:
        return None
    *of_weight, eps, _ = cuda.weight_arguments(weight, options)
    qat, per_tensor = torch.ops.qat, config.act_granularity == "tensor"
    return Ops(qat.cuda_fused_linear.default, qat.cuda_fused_gradients.default, (*of_weight, per_tensor, eps))
