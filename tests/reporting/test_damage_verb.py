"""The damage verb: table, JSON and picture of one measurement, what would help, and the same map on a run's page."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from run_folders import write_run
from test_page import drawable, shown_figures, words

from qat import damage as verb
from qat.config.compose.composing import compose_run
from qat.evaluation.remedies import Remedy, settings
from qat.reporting.page.reading import read_run
from qat.reporting.page.render import report


def test_table_json_and_picture(tiny_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "map.json", tmp_path / "map.html"
    asked = [str(tiny_model), "--text", str(text_file), "--tokens", "64", "--out", str(out), "--picture", str(picture)]
    assert verb.main([*asked, "data.sequence_length=32"]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert len(found["layers"]) == 14 and found["tokens"] == 62 and len(found["remedies"]) == 10
    worst = max(found["layers"], key=lambda name: found["layers"][name]["kl"])
    first = found["remedies"][0]
    assert first["layer"] == worst and first["kl"] == found["layers"][worst]["kl"] > first["second_kl"] > 0
    assert first["exclude_bytes"] == first["weights"] * 14 // 8 and first["second_bytes"] == first["weights"] // 4
    assert f"model.exclude=[{worst}]" in said and said.endswith(f"{out}\n{picture}\n")
    html = picture.read_text()
    assert f"Alone, {worst} does the most damage." in words(html)
    drawable(shown_figures(html))
    (tmp_path / "run").mkdir()
    (write_run(tmp_path / "run") / "damage.json").write_text(out.read_text())
    page = report(read_run(tmp_path / "run"))
    assert {"Families", "Layers"} <= {one["title"] for one in shown_figures(page)} and "On 62 tokens" in words(page)


def test_what_is_to_be_tried_composes() -> None:
    one = Remedy("model.layers.0.mlp.up_proj", 8, 2.0, 14, 0.5, 2)
    found = [shlex.split(line)[0] for line in settings([one])]
    config = compose_run(["model.path=x", *found])
    assert config.model.exclude == [one.layer]
    assert config.quant.overrides == {one.layer: {"components": 2}}
    assert len(settings([Remedy(one.layer, 8, 2.0, 14, None, 2)])) == 1 and settings([]) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--text", "x.txt"], "a model is missing"),
        (["nowhere/x.gguf", "--text", "x.txt", "--picture", "x.svgz"], "name it .html, .svg or .png"),
        (["MODEL", "--text", "x.txt", "--tokens", "1"], "--tokens 1 is not allowed"),
        (["MODEL", "other", "--text", "x.txt"], "give one model"),
        (["MODEL", "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_is_wrong_is_one_line(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert verb.main([str(tiny_model) if word == "MODEL" else word for word in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and expected in said
