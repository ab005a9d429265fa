"""The verb `python -m qat.inspect FILE_OR_FOLDER`: what is it, how are its weights stored, and who can read it.

`--verify OTHER` compares the codes and scales of two models, whatever their formats, and names the first difference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

from qat.config.flags import run_verb

if TYPE_CHECKING:
    from torch import Tensor

    from qat.formats.contents import Codes, Contents


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
    from qat.formats.contents import read

    found = read(path)
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
    return {**about, "file bytes": found.file_bytes, "readers": found.readers}


def _summary(found: Contents) -> Summary:
    import torch

    total, scales = Summary(), []
    for name, layer in found.layers.items():
        codes = _checked(name, layer())
        total.layers += 1
        total.weights += codes.codes.numel() // codes.components
        total.codes += codes.codes.numel()
        total.zeros += int((codes.codes == 0).sum())
        total.bytes += codes.bytes
        scales.append(codes.scale.flatten())
    every = torch.cat(scales)
    total.scales = (float(every.min()), float(every.median()), float(every.max()))
    return total


def _checked(name: str, codes: Codes) -> Codes:
    import torch

    if not bool(torch.isfinite(codes.scale).all() and (codes.scale > 0).all()):
        raise ValueError(f"{name} has scales that are not finite and above 0")
    return codes


def verify(path: str, other: str) -> str:
    """One line that says that both hold the same codes and scales, the latter as precisely as the coarser file has them.

    Layers are compared by name; a larger layer may be the smaller one padded with zero rows and columns. Beside a GGUF file, the
    other's layers are named, and their rows ordered, as in GGUF.

    Raises:
        ValueError: they differ; the first layer, row and column are named. Or they cannot be compared.
    """
    from qat.formats.contents import read
    from qat.formats.matching import matched

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
        worst = max(worst, _compare(name, _checked(name, mine[name]()), _checked(name, theirs[name]())))
    return f"equal: {len(mine)} layers have the same codes, and scales that differ by at most {worst:.1e} (relative)"


def _compare(name: str, one: Codes, two: Codes) -> float:
    """The largest relative difference of the scales; ValueError for different codes or scales."""
    import torch

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
    import torch

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat.inspect", description="What a model file or folder holds.")
    parser.add_argument("path", metavar="FILE_OR_FOLDER", help="run, packed folder, bitnet folder, .safetensors or .gguf file")
    parser.add_argument("--verify", metavar="OTHER", help="compare codes and scales with another; exit code 2 if they differ")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trust-remote-code", action="store_true", help="as the other verbs take it; here no code is ever run")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error or a difference, which is one line on stderr."""
    args = _parser().parse_args(arguments)
    return run_verb("inspect", lambda: _show(args.path, args.verify, args.json))


def _show(path: str, other: str | None, as_json: bool) -> None:
    about = inspect(path)
    if as_json:
        print(json.dumps(about | ({"verify": verify(path, other)} if other else {}), indent=2))
        return
    for key, value in about.items():
        print(f"{key:<27}{_text(key, value)}")
    if other:
        print(f"{'verify':<27}{verify(path, other)}")


def _text(key: str, value: Any) -> str:
    if key == "scales":
        return f"{value[0]:g} to {value[2]:g}, median {value[1]:g}"
    if key == "other tensors":
        return "; ".join(f"{a['count']} {what} ({a['bytes']:,} bytes)" for what, a in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(main())
