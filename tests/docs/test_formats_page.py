"""docs/reference/formats.md says what the code writes: layouts, block types, files of a run."""

from __future__ import annotations

import re
from pathlib import Path

from qat.formats.gguf import i2s
from qat.formats.gguf.blocks import BLOCKS
from qat.formats.packed.manifest import METHOD
from qat.formats.seal import SUMS
from qat.quantizers.packing import LAYOUTS

PAGE = (Path(__file__).resolve().parents[2] / "docs/reference/formats.md").read_text(encoding="utf-8")


def test_block_types() -> None:
    rows = dict(re.findall(r"^\| ([TQ]\w+) \| (\d+ \| \d+ \| \d+) ", PAGE, flags=re.M))
    assert rows == {name.upper(): f"{kind.number} | {kind.weights} | {kind.bytes}" for name, kind in BLOCKS.items()}
    assert f"n / 4 + {i2s.TRAILER} |" in PAGE


def test_layouts() -> None:
    named = re.findall(r"^\| `(\w+)` \| (four|five)", PAGE, flags=re.M)
    assert dict(named) == {name: {4: "four", 5: "five"}[layout.per_byte] for name, layout in LAYOUTS.items()}
    assert f"| {LAYOUTS['base3'].limit} and above |" in PAGE


def test_files() -> None:
    assert f"quant_method: {METHOD}" in PAGE and f"`{SUMS}`" in PAGE
