"""docs/reference/formats.md says what the code writes: layouts, block types, files of a run."""

from __future__ import annotations

import re
from pathlib import Path

from qat.formats.gguf import i2s
from qat.formats.gguf.blocks import BLOCKS
from qat.formats.packed.manifest import METHOD
from qat.formats.seal import SUMS
from qat.quantizers.layouts import LAYOUTS
from qat.quantizers.packing.digits import BASE3

PAGE = (Path(__file__).resolve().parents[2] / "docs/reference/formats.md").read_text(encoding="utf-8")


def test_block_types() -> None:
    rows = dict(re.findall(r"^\| ([TQ]\w+) \| (\d+ \| \d+ \| \d+) ", PAGE, flags=re.M))
    assert rows == {name.upper(): f"{kind.number} | {kind.weights} | {kind.bytes}" for name, kind in BLOCKS.items()}
    assert f"n / 4 + {i2s.TRAILER} |" in PAGE


def test_layouts() -> None:
    named = re.findall(r"^\| `(\w+)` \| (four|five)", PAGE, flags=re.M)
    assert dict(named) == {name: {4: "four", 5: "five"}[layout.weights] for name, layout in LAYOUTS.items() if layout.bytes == 1}
    assert f"| {BASE3.base**BASE3.per_byte} and above |" in PAGE
    rest = re.findall(r"^\| `(\w+)` \| (\d+) codes .* share (\d+) bytes", PAGE, flags=re.M)
    assert rest == [(name, str(form.weights), str(form.bytes)) for name, form in LAYOUTS.items() if form.bytes > 1]


def test_files() -> None:
    assert f"quant_method: {METHOD}" in PAGE and f"`{SUMS}`" in PAGE
