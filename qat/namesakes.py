"""Other distributions that have the import name `qat` (a Qt tester, a quantum kit): they are named, once, in one line.

pip lets two distributions write into one folder, and the last one wins silently. Where ours is imported, theirs is found by two
looks, together below a millisecond: a folder `qat` elsewhere on the path, and a distribution beside us that says it has our
files. importlib.metadata's own answer reads the records of every distribution, which takes longer than the rest of `import qat`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

_OURS = "qat_bitlinear"


def warn() -> None:
    """Say on stderr which other `qat` is there, if one is."""
    package = Path(__file__).parent
    found = [*_mixed_in(package.parent), *_hidden()]
    if found:
        names = ", ".join(found)
        print(f"qat: {names} has the import name qat too; keep it and qat-bitlinear in separate environments", file=sys.stderr)


def _mixed_in(site: Path) -> Iterator[str]:
    """`NAME VERSION` of the distributions that were installed into our own folder."""
    for entry in sorted(os.listdir(site)):
        name, _, version = entry.removesuffix(".dist-info").partition("-")
        if entry.endswith(".dist-info") and entry.startswith(("qat", "myqlm")) and name != _OURS and _has_our_name(site / entry):
            yield f"{name} {version}"


def _has_our_name(distribution: Path) -> bool:
    try:
        return any(line.startswith("qat/") for line in (distribution / "RECORD").open(encoding="utf-8"))
    except OSError:
        return False


def _hidden() -> Iterator[str]:
    """The folders `qat` on the path that the import of ours hides."""
    for place in filter(None, dict.fromkeys(sys.path)):
        other = os.path.join(place, "qat")
        ours = os.path.isfile(os.path.join(other, "namesakes.py"))  # this one, or one installed behind a checkout
        if not ours and os.path.isfile(os.path.join(other, "__init__.py")):
            yield other
