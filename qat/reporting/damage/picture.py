"""The damage map as one picture, SVG or PNG: families by blocks, and the worst layers with what would help them.

matplotlib draws it without a browser, which plotly's own export (kaleido) needs; it is an extra, loaded only where a picture is
asked for. Colours are logarithms, as layers differ by orders of magnitude.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qat.conversion.families import families
from qat.evaluation.remedies import Remedy
from qat.reporting.page.parts import megabytes
from qat.storage import new_file

KINDS = (".svg", ".png")
INSTALL = "matplotlib is not installed: pip install 'qat-bitlinear[picture]'"
_SMALLEST = 1e-12
"""Of KL: a layer below it did nothing."""


def check_picture(file: Path) -> None:
    """ValueError where the picture could not be drawn."""
    if file.suffix not in KINDS:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{file}: {INSTALL}") from error


def grid(layers: Mapping[str, float]) -> tuple[list[str], list[list[float]]]:
    """Families, and for each the KL of its layers from the first block to the last; NaN where it has fewer than another."""
    rows: dict[str, list[float]] = {}
    for name, family in families(layers).items():
        rows.setdefault(family, []).append(layers[name])
    most = max(map(len, rows.values()), default=0)
    return list(rows), [[*row, *[math.nan] * (most - len(row))] for row in rows.values()]


def draw(title: str, layers: Mapping[str, float], found: Sequence[Remedy], file: Path) -> None:
    """Write the picture; the suffix of `file` says its kind, of `KINDS`.

    Args:
        layers: name -> KL of the layer alone, nats a token.
        found: the worst layers, what would help each, and its cost.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names, rows = grid(layers)
    heights = [0.45 * len(names) + 0.6, 0.35 * max(len(found), 1) + 0.6]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "qat"}):
        figure = Figure(figsize=(11, sum(heights) + 1.4), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=heights)
        figure.suptitle(title)
        _heat(figure, above, names, rows)
        _bars(below, found)
        written = io.BytesIO()
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        figure.savefig(written, format=file.suffix[1:], dpi=150, metadata=metadata)
    with new_file(file) as partial:
        partial.write_bytes(written.getvalue())


def _heat(figure: Any, axes: Any, names: list[str], rows: list[list[float]]) -> None:
    logs = [[math.log10(max(one, _SMALLEST)) if math.isfinite(one) else math.nan for one in row] for row in rows]
    image = axes.imshow(logs, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set(title="Damage of each layer alone", xlabel="block", yticks=range(len(names)), yticklabels=names)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="log10 of KL, nats a token")


def _bars(axes: Any, found: Sequence[Remedy]) -> None:
    """The text at a bar says what helps, and the bytes that it costs."""
    axes.barh(range(len(found)), [one.kl if math.isfinite(one.kl) else 0.0 for one in found], color="#9ec5f4")
    axes.set(title="The worst layers, and what would help", xlabel="KL, nats a token")
    axes.set(yticks=range(len(found)), yticklabels=[one.layer for one in found])
    axes.invert_yaxis()
    for row, one in enumerate(found):
        axes.annotate(helps(one), (0, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def helps(one: Remedy) -> str:
    """A layer's remedies with their bytes."""
    out = f"left out: +{megabytes(one.exclude_bytes)}"
    second = "" if one.second_kl is None else f"; 2 components: KL {one.second_kl:.3g}, +{megabytes(one.second_bytes)}"
    return out + second
