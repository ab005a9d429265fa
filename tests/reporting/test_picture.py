"""The damage map as SVG and PNG, drawn without a browser."""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qat import damage as verb
from qat.evaluation.remedies import Remedy
from qat.reporting.damage.picture import draw, grid, helps

LAYERS = {f"layers.{block}.mlp.{name}_proj": 0.01 * (block + 1) for block in range(3) for name in ("up", "down")}
WORST = [Remedy("layers.2.mlp.up_proj", 8, 0.03, 14_000, 0.001, 2_000), Remedy("layers.1.mlp.up_proj", 8, math.inf, 14, None, 2)]


def test_rows_are_families_and_columns_blocks() -> None:
    names, rows = grid({**LAYERS, "head": 5.0})
    assert names == ["up", "down", "head"] and rows[0] == pytest.approx([0.01, 0.02, 0.03])
    assert rows[2][0] == 5.0 and all(map(math.isnan, rows[2][1:]))


def test_svg_says_what_helps_and_what_it_costs(tmp_path: Path) -> None:
    file = tmp_path / "map.svg"
    draw("a model", {**LAYERS, "head": math.nan}, WORST, file)
    said = " ".join(ElementTree.parse(file).getroot().itertext())
    assert "layers.2.mlp.up_proj" in said and "down" in said and "a model" in said
    assert helps(WORST[0]) == "left out: +14.00 kB; 2 components: KL 0.001, +2.00 kB" and helps(WORST[0]) in said
    first = file.read_bytes()
    draw("a model", {**LAYERS, "head": math.nan}, WORST, file)
    assert file.read_bytes() == first  # no date, no random names


def test_png_and_thousands_of_layers(tmp_path: Path) -> None:
    file = tmp_path / "map.png"
    draw("large", {f"layers.{block}.{name}": 0.1 for block in range(800) for name in ("q", "k", "v")}, [], file)
    data = file.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and 1000 < width < 3000 and 300 < height < 3000


def test_the_verb_writes_it(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    asked = [str(tiny_model), "--text", str(text_file), "--tokens", "64", "--picture", str(tmp_path / "map.svg"), "-v"]
    assert verb.main([*asked, "data.sequence_length=32"]) == 0
    assert "2 components: KL" in (tmp_path / "map.svg").read_text()


def test_without_matplotlib_it_is_one_line_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert verb.main(["nowhere", "--text", "x.txt", "--picture", "map.png"]) == 2
    assert capsys.readouterr().err == "qat.damage: map.png: matplotlib is not installed: pip install 'qat-bitlinear[picture]'\n"
