"""Which training linears one op of a GPU's serves, and how it is told of them."""

from __future__ import annotations

import torch

from qat.config import QuantConfig
from qat.ops import cpu, cuda, products
from qat.ops.fused.linear import Ops, fits
from qat.ops.options import WeightOptions, weight_options
from qat.quantizers.record import resolve


def ops_for(config: QuantConfig, weight: torch.Tensor) -> Ops | None:
    """The ops of a layer; None where others serve it: scales that no kernel takes, and devices that multiply by bfloat16.

    Their autograd node lies in the CPU's library."""
    n, k = weight.shape
    known = fits(config, config.quantizer) and resolve(config.quantizer.codes) in cuda._CODES and cpu.compiled()
    if not known or n * k == 0 or not cuda._serves(weight, k) or products.preferred(weight):
        return None
    options = WeightOptions(*weight_options(config))
    if cuda.reduction_of(options) is None:
        return None
    *of_weight, eps, _ = cuda.weight_arguments(weight, options)
    per_tensor, bf16 = config.act_granularity == "tensor", config.backward == "bf16"
    return Ops(torch.ops.qat.cuda_fused_linear.default, (*of_weight, per_tensor, eps, bf16))
