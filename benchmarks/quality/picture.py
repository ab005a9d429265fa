"""Bytes against perplexity: which settings no other one beats in both."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

Point = tuple[str, str, int, float]


def front(points: list[Point]) -> list[Point]:
    """The points that no other one beats in bytes and perplexity, by bytes."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point[2], point[3])):
        if not kept or point[3] < kept[-1][3]:
            kept.append(point)
    return kept


def save(points: list[Point], file: Path) -> None:
    """Write the picture of (row, of, bytes, perplexity)."""
    figure, axes = plt.subplots(figsize=(8, 5))
    best = front(points)
    axes.step(
        [p[2] for p in best], [p[3] for p in best], where="post", color="tab:green", lw=1, label="nothing is better in both"
    )
    for ours in (True, False):
        some = [point for point in points if (point[1] == "ours") == ours]
        label = "this project" if ours else "peers and references"
        axes.scatter([p[2] for p in some], [p[3] for p in some], marker="o" if ours else "x", label=label, s=28)
    for name, _, size, perplexity in points:
        axes.annotate(name, (size, perplexity), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="bytes of the linear layers", ylabel="perplexity", title="Size and quality")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)
