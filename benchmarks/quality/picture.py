"""Bytes against perplexity: which settings no other one beats in both."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: E402

Point = tuple[str, str, int, float]

GROUPS = {"ours": ("o", "tab:green", "this project"), "post-training": ("s", "tab:gray", "no training (torchao)")}
OTHERS = ("x", "tab:red", "peers and references")


def front(points: list[Point]) -> list[Point]:
    """The points that no other one beats in bytes and perplexity, by bytes."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point[2], point[3])):
        if not kept or point[3] < kept[-1][3]:
            kept.append(point)
    return kept


def save(points: list[Point], file: Path, full: float | None = None, most: float = 12.0) -> None:
    """Write the picture of (row, of, bytes, perplexity).

    `full` is the untouched model's perplexity. Points above `most` are left out, and named below the axis.
    """
    shown = [point for point in points if point[3] <= most]
    if not shown:
        raise ValueError(f"no point of perplexity {most:g} or below, so nothing to draw")
    figure, axes = plt.subplots(figsize=(9, 6))
    best = front(shown)
    axes.step(
        [p[2] for p in best], [p[3] for p in best], where="post", color="tab:green", lw=1, label="nothing is better in both"
    )
    for style in (*GROUPS.values(), OTHERS):
        some = [point for point in shown if GROUPS.get(point[1], OTHERS) == style]
        axes.scatter([p[2] for p in some], [p[3] for p in some], marker=style[0], color=style[1], label=style[2], s=28, zorder=3)
    if full is not None:
        axes.axhline(full, color="black", lw=0.8, ls=":", label=f"full precision, {full:.3f}")
    axes.set(
        xscale="log", yscale="log", xlabel="bytes of the linear layers, packed", ylabel="perplexity", title="Size and quality"
    )
    _name(axes, shown)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks([tick for tick in (5, 6, 7, 8, 10, 12, 15, 20) if tick <= most])
    axes.set_xlim(right=max(p[2] for p in shown) * 1.25)
    axes.set_xticks(ticks := [50_000, 60_000, 70_000, 80_000, 100_000, 120_000, 140_000], [f"{tick:,}" for tick in ticks])
    axes.legend(fontsize=8)
    left = [f"{name} ({value:,.0f})" for name, _, _, value in points if value > most]
    if left:
        axes.set_xlabel(f"{axes.get_xlabel()}\nabove the picture: {', '.join(left)}")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def _name(axes: Axes, points: list[Point]) -> None:
    """Names right of their points; of points of a size, those that would overlap are moved apart."""
    last: dict[int, float] = {}
    for name, _, size, value in sorted(points, key=lambda point: point[3]):
        near = next((y for other, y in last.items() if abs(other / size - 1) < 0.12), 0.0)
        y = max(value, near * 1.025)
        last[size] = y
        axes.annotate(name, (size, value), xytext=(size * 1.012, y * 1.006), fontsize=7, va="center")
