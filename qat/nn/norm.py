"""The RMSNorm that a quantized layer may have for its own input (`quant.rms_norm_eps`): SubLN of BitNet b1.58."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.nn.carried import carried_share

_CPU = torch.device("cpu")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, arXiv:1910.07467, in float32 and cast back before the weight.

    Not torch's: transformers' bitnet layers norm in these operations and this order, and equal bits before the quantization are
    equal codes after it.

    While `blend` is set, it gives x + blend (norm(x) - x) instead: a norm that a pretrained model has not had is blended in.
    """

    blend: Tensor | None = None
    """A number of 0 to 1 on the CPU, from where every device takes it; None, which is what is deployed: the norm itself."""

    def __init__(self, width: int, eps: float, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        normed = self.weight * wide.to(x.dtype)
        return normed if self.blend is None else x + self.blend * (normed - x)

    def set_blend(self, value: float) -> None:
        """How much of the norm there is; 1 is the norm itself. ValueError unless it is in 0 to 1."""
        self.blend = carried_share("blend", value, self.blend, _CPU)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def input_norm(width: int, eps: float | None, device: Any = None, dtype: torch.dtype | None = None) -> RMSNorm | None:
    """The norm that a layer with this `quant.rms_norm_eps` has; None where it has none."""
    return None if eps is None else RMSNorm(width, eps, device, dtype)
