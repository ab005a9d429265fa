"""Whether two models, whatever their formats, hold the same codes and scales."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from qat.formats.contents import Codes, read
from qat.formats.inspection.report import checked
from qat.formats.matching import matched


def compare_codes(path: str, other: str) -> str:
    """One line that says that both hold the same codes and scales, the latter as precisely as the coarser file has them.

    Layers are compared by name; a larger layer may be the smaller one padded with zero rows and columns. Beside a GGUF file, the
    other's layers are named, and their rows ordered, as in GGUF.

    Raises:
        ValueError: they differ; the first layer, row and column are named. Or they cannot be compared.
    """
    one, two = read(path), read(other)
    for name, found in ((path, one), (other, two)):
        if not found.layers:
            raise ValueError(f"{name} ({found.kind}) has no quantized layers that could be compared")
    mine, theirs = matched(one, two)
    only = sorted(set(mine) ^ set(theirs))
    if only:
        where = path if only[0] in mine else other
        raise ValueError(f"the layer {only[0]} and {len(only) - 1} more are in one of the two only: {where}")
    worst = 0.0
    for name in mine:
        worst = max(worst, _compare(name, checked(name, mine[name]()), checked(name, theirs[name]())))
    return f"equal: {len(mine)} layers have the same codes, and scales that differ by at most {worst:.1e} (relative)"


def _compare(name: str, one: Codes, two: Codes) -> float:
    """The largest relative difference of the scales; ValueError for different codes or scales."""
    n, k = (max(a, b) for a, b in zip(one.codes.shape, two.codes.shape, strict=True))
    padded = [torch.nn.functional.pad(c.codes, (0, k - c.codes.shape[1], 0, n - c.codes.shape[0])) for c in (one, two)]
    wrong = (padded[0] != padded[1]).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        values = f"{int(padded[0][row, column])} and {int(padded[1][row, column])}"
        raise ValueError(f"codes differ in {len(wrong):,} places, the first is {name}[{row}, {column}]: {values}")
    width, first, second = _scales(one, two)
    relative = (first - second).abs() / first
    if float(relative.max()) > _tolerance(one, two):
        row, column = divmod(int(relative.argmax()), relative.shape[1])
        values = f"{float(first[row, column]):.8g} and {float(second[row, column]):.8g}"
        raise ValueError(f"scales differ, most of all {name}[{row}, {column * width}]: {values}")
    return float(relative.max())


def _tolerance(one: Codes, two: Codes) -> float:
    """Of a scale, relative: half a unit of the coarser dtype where the two differ; and 1 / (1 / s) is s up to one rounding."""
    coarser = max(torch.finfo(one.stored).eps, torch.finfo(two.stored).eps)
    return 1e-6 + (0.0 if one.stored == two.stored else 0.505 * coarser)


def _scales(one: Codes, two: Codes) -> tuple[int, Tensor, Tensor]:
    """Both layers' scales for every so many columns, the first value, of the rows and columns that both have."""
    rows, columns = (min(a, b) for a, b in zip(one.codes.shape, two.codes.shape, strict=True))
    widths = [c.codes.shape[1] // c.scale.shape[1] for c in (one, two)]
    width = gcd(columns, *widths)
    spread = [
        c.scale.repeat_interleave(wide // width, 1)[:rows, : columns // width].expand(rows, -1)
        for c, wide in zip((one, two), widths, strict=True)
    ]
    return width, *spread  # type: ignore[return-value]
