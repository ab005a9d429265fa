"""What a model file or folder is: its kind, how its weights are stored, and who can read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qat.formats.contents import Codes, Contents, read
from qat.formats.inspection.seals import seal_of
from qat.formats.seal import Seal


@dataclass
class Summary:
    """The quantized layers together."""

    layers: int = 0
    weights: int = 0
    codes: int = 0
    """As many as weights, or more: a weight may be the sum of several."""
    zeros: int = 0
    bytes: int = 0
    scales: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Smallest, median and largest."""


def inspect(path: str) -> dict[str, Any]:
    """What `path` is, as plain values; ValueError where it is damaged or of no known kind."""
    return examine(path)[0]


def examine(path: str) -> tuple[dict[str, Any], Seal]:
    """`inspect`, and whether the files are as they were written, which is in words among the values, too."""
    found, seal = read(path), seal_of(Path(path))
    about: dict[str, Any] = {"path": str(path), "kind": found.kind, "convention": found.convention, **found.facts}
    if found.layers:
        total = _summary(found)
        about |= {
            "quantized layers": total.layers,
            "weights": total.weights,
            "zero fraction": round(total.zeros / total.codes, 4),
            "scales": [float(f"{value:.4g}") for value in total.scales],
            "bits per weight": round(8 * total.bytes / total.weights, 4),
            "quantized bytes": total.bytes,
        }
    about["other tensors"] = {what: {"count": count, "bytes": size} for what, (count, size) in sorted(found.others.items())}
    return {**about, "file bytes": found.file_bytes, "readers": found.readers, "seal": str(seal)}, seal


def _summary(found: Contents) -> Summary:
    total, scales = Summary(), []
    for name, layer in found.layers.items():
        codes = checked(name, layer())
        total.layers += 1
        total.weights += codes.codes.numel() // codes.components
        total.codes += codes.codes.numel()
        total.zeros += int((codes.codes == 0).sum())
        total.bytes += codes.bytes
        scales.append(codes.scale.flatten())
    every = torch.cat(scales)
    total.scales = (float(every.min()), float(every.median()), float(every.max()))
    return total


def checked(name: str, codes: Codes) -> Codes:
    """The codes themselves; ValueError for scales that no quantizer gives."""
    if not bool(torch.isfinite(codes.scale).all() and (codes.scale > 0).all()):
        raise ValueError(f"{name} has scales that are not finite and above 0")
    return codes


def lines(about: dict[str, Any]) -> list[str]:
    """What a person reads of `inspect`'s result."""
    return [f"{key:<27}{_text(key, value)}" for key, value in about.items()]


def _text(key: str, value: Any) -> str:
    if key == "scales":
        return f"{value[0]:g} to {value[2]:g}, median {value[1]:g}"
    if key == "other tensors":
        return "; ".join(f"{a['count']} {what} ({a['bytes']:,} bytes)" for what, a in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
