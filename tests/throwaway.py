"""Quantizers that the product does not have: what a contributor would write, put into the table for a test."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat.quantizers import QUANTIZERS
from qat.quantizers.record import Parameter, Quantizer, WeightOptions


def _coarse_codes(rows: Tensor, scale: Tensor) -> Tensor:
    """Kept above 0.7 times the scale."""
    return torch.where(rows.abs() > 0.7 * scale, rows.sign(), 0.0)


def _step(rows: Tensor, options: WeightOptions) -> Tensor:
    return rows.abs().mean(-1, keepdim=True)


def _learned(rows: Tensor, options: WeightOptions, step: Tensor) -> Tensor:
    return step.abs()


def _learned_gradient(grad: Tensor, rows: Tensor, codes: Tensor, scale: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Learned step size, arXiv:1902.08153, eq. 3 and 5: clipped, and of the step what rounding leaves."""
    inside = (rows / scale).abs() <= 1
    of_step = torch.where(inside, codes - rows / scale, codes) * step.sign()
    return grad * inside, {"step": (grad * of_step).sum(-1, keepdim=True)}


def _sign_codes(rows: Tensor, scale: Tensor, temperature: Tensor) -> Tensor:
    return torch.where(rows >= 0, 1.0, -1.0)


def _annealed_gradient(
    grad: Tensor, rows: Tensor, codes: Tensor, scale: Tensor, temperature: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """That of tanh(temperature w / s), which nears the sign as the temperature rises."""
    return grad * temperature * (1 - torch.tanh(temperature * rows / scale) ** 2), {}


def _quad_codes(rows: Tensor, scale: Tensor) -> Tensor:
    return ((rows / scale).floor() * 2 + 1).clamp(-3, 3)


THROWAWAY = {
    "coarse": Quantizer(levels=(-1, 0, 1), codes=_coarse_codes, packs_as=("ternary",), scales=("absmean",)),
    "learned": Quantizer(
        levels=(-1, 0, 1),
        codes="qat.quantizers.ternary:codes",
        scale=_learned,
        gradient=_learned_gradient,
        parameters={"step": Parameter(_step)},
        packs_as=("ternary",),
        scales=("absmean",),
    ),
    "annealed": Quantizer(
        levels=(-1, 1),
        codes=_sign_codes,
        gradient=_annealed_gradient,
        parameters={"temperature": Parameter(lambda rows, options: torch.tensor(2.0), per="layer", trained=False)},
        packs_as=("binary", "ternary"),
        scales=("absmean",),
    ),
    "quad": Quantizer(levels=(-3, -1, 1, 3), codes=_quad_codes, scales=("absmean",), backwards=("input", "bf16")),
}
"""Codes of its own; a learned scale and a clipped gradient; a gradient annealed from outside; codes that no layout holds."""

GROUP = 24
CASES = [
    {
        "weight": weight,
        "components": 1 if record.ratios else planes,
        "component_scales": component_scales,
        "granularity": granularity,
        "group_size": GROUP if granularity == "group" else None,
    }
    for weight, row in {**QUANTIZERS, **THROWAWAY}.items()
    for component_scales, record in (("fitted", row), *row.sums.items())
    for planes in record.planes
    for granularity in record.granularities
    if planes < 4
]
"""Keys of `quant` for every row of the table and of these, every sum of planes and granularity that it allows."""


def put_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test the table has these rows too."""
    for name, row in THROWAWAY.items():
        monkeypatch.setitem(QUANTIZERS, name, row)
