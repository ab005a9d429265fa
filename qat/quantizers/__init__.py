"""How a weight is quantized: the table of quantizers, and one file for each family of them; activations; byte layouts.

A new one is a file with its functions and a row here. Nothing else knows its name: the configuration takes what the row allows,
the kernels compute what they declare to know (anything else is computed by the row's own functions), and the formats hold what
the row says it packs as. `record` says what a row is made of.
"""

from __future__ import annotations

from dataclasses import replace

from qat.quantizers.menu import ROWS
from qat.quantizers.record import Parameter, Quantizer

_FITTED = Quantizer(
    levels=(-1, 0, 1),
    codes="qat.quantizers.components:codes",
    scale="qat.quantizers.components:scale",
    soft="qat.quantizers.components:soft",
    packs_as=("ternary",),
    scales=("absmean",),
    backwards=("input", "bf16"),
    planes=(2, 3, 4),
    words="{components} {weight} components, least squares",
    why="their scales are fitted, and their gradients input or bf16",
)
_LEARNED = replace(
    _FITTED,
    scale="qat.quantizers.components:learned_scale",
    gradient="qat.quantizers.components:learned_gradient",
    parameters={"component_scales": Parameter("qat.quantizers.components:scale")},
    words="{components} {weight} components, learned scales",
    why="their scales start as a fit, and their gradients are input or bf16",
)
QUANTIZERS: dict[str, Quantizer] = {
    "ternary": Quantizer(
        levels=(-1, 0, 1),
        codes="qat.quantizers.ternary:codes",
        part="qat.quantizers.ternary:part",
        soft="qat.quantizers.ternary:soft",
        packs_as=("ternary",),
        sums={"fitted": _FITTED, "learned": _LEARNED},
    ),
    "binary": Quantizer(
        levels=(-1, 1),
        codes="qat.quantizers.binary:codes",
        part="qat.quantizers.binary:part",
        soft="qat.quantizers.binary:soft",
        packs_as=("binary", "ternary"),
        scales=("absmean",),
    ),
    **ROWS,
}


def find(weight: str, components: int = 1, component_scales: str = "fitted") -> Quantizer | None:
    """The record for a weight quantized so, as a sum of that many planes; None where the table has none."""
    row = QUANTIZERS.get(weight)
    while row is not None and components not in row.planes:
        row = row.sums.get(component_scales)
    return row


def planes_of(weight: str, components: int) -> int:
    """How many planes of codes a weight quantized so has: as many as the user's components, unless its row says."""
    row = QUANTIZERS.get(weight)
    return len(row.ratios) if row is not None and row.ratios else components


def summable(components: int) -> list[str]:
    """The rows that can be a sum of that many planes, with a scale each."""
    found = {name: find(name, components) for name in QUANTIZERS}
    return [name for name, row in found.items() if row is not None and not row.ratios]
