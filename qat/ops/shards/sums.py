"""The scales of weights that have one each and lie in rows on several devices: of all layers by one sum over the devices.

A rank's part of a mean is a sum in float64, and so is the sum over ranks, which is then divided and rounded to float32 once, as
`qat.quantizers.scales` does with a whole weight: who holds which rows does not matter. The mean of the ranks' own means would:
the last rank may have fewer rows, or none.

They are taken anew at every forward of the model, not after each optimizer step: then nobody can forget to, whatever changed the
weights, and optimizers that work on lists of tensors tell no version counter. It costs a read of the device's own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qat import parallel
from qat.ops.options import WeightOptions
from qat.quantizers.scales import multiplied, round_scale


@dataclass(frozen=True)
class Pooled:
    """What a whole weight says to the codes of its parts: its scale and its mean, both float32 [1, 1]."""

    scale: Tensor
    mean: Tensor


def local_sums(rows: Tensor) -> Tensor:
    """(sum of magnitudes, sum) of rows [n, K], float64 [2]."""
    if rows.numel() == 0:
        return rows.new_zeros(2, dtype=torch.float64)
    values = rows.double()  # once: torch's sums that convert as they go take twice as long on a CPU
    mean = values.sum()
    return torch.stack([values.abs_().sum(), mean])


def pooled(sums: Tensor, count: int, o: WeightOptions) -> Pooled:
    """From the sums over a whole weight of `count` elements, `quant.scale=absmean`."""
    magnitude, mean = (sums / count).float().reshape(2, 1, 1)
    return Pooled(round_scale(multiplied(magnitude, o).clamp_min(o.eps), o.scale_dtype), mean)


def summed(parts: Sequence[Tensor]) -> list[Tensor]:
    """The sums over ranks of every layer's [2], by one exchange of float64."""
    return parallel.sums([torch.stack(list(parts))])[0].unbind() if parts else []  # type: ignore[return-value]
