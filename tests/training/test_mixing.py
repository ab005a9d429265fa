"""Runs whose layers differ: by `quant.overrides`, and by what `quant.budget_bits` chooses, writes down and keeps on resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import TRAINER
from transformers import AutoModelForCausalLM

import qat
from qat.config import ExportConfig, QuantConfig, TrainConfig
from qat.config.compose.saved import load_config
from qat.conversion.layers import packed_layers
from qat.evaluation import mixing
from qat.formats.packed import folder as packed
from qat.training.exports import unwritten
from qat.training.run import run

SHORT = replace(TRAINER, max_steps=2)


def twice(folder: Path) -> list[str]:
    """Layers of a run's packed model that have two components."""
    layers = packed_layers(packed.load(folder / "packed"))
    return [name for name, layer in layers.items() if layer.config.components == 2]


def test_a_budget_is_spent_written_and_kept(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, trainer=SHORT, quant=QuantConfig(granularity="channel", component_scales="learned", budget_bits=2.5))
    result, folder = run(config), tmp_path / "run"
    said = json.loads((folder / mixing.FILE).read_text())
    chosen = [one["name"] for one in said["shares"] if one["components"] == 2]
    assert 0 < len(chosen) < 14 == len(said["shares"]) and twice(folder) == chosen
    assert f"{len(chosen)} of 14 layers get 2 components" in capsys.readouterr().out
    assert set(result.conversion["overrides"]) == set(chosen)
    assert result.verification["packed_max_logit_difference"] == 0

    monkeypatch.setattr(mixing, "spend", lambda *_, **__: pytest.fail("measured again"))
    again = load_config(str(folder), ["trainer.max_steps=4"])
    again.resume = str(folder)
    assert run(again).status == "done" and twice(folder) == chosen
    other = replace(again, export=replace(again.export, layout="base3"), trainer=replace(again.trainer, max_steps=5))
    wanted = r"was chosen for 2.5 bits in 2bit, so the run cannot go on with quant.budget_bits=2.5 in export.layout=base3"
    with pytest.raises(ValueError, match=wanted):
        run(other)
    (folder / mixing.FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"budget.json is damaged"):
        run(replace(again, trainer=replace(again.trainer, max_steps=5)))


def test_overrides_of_a_run_are_saved_in_their_order(config: TrainConfig, tmp_path: Path) -> None:
    overrides = {"model.layers.*": {"components": 2}, "*.mlp": {"components": 1}}
    config = replace(config, trainer=SHORT, quant=QuantConfig(component_scales="learned", overrides=overrides))
    run(config)
    assert [name.split(".")[3] for name in twice(tmp_path / "run")] == ["self_attn"] * 8
    saved = load_config(str(tmp_path / "run")).quant
    assert list(saved.overrides.items()) == list(overrides.items())


def test_what_no_run_can_have_is_refused_first(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quant.budget_bits=1.5 is below the 2 bits of one component in export.layout=2bit"):
        run(replace(config, quant=QuantConfig(budget_bits=1.5)))
    with pytest.raises(ValueError, match=r"quant.overrides: 'down_proj' matches none of the 14 converted layers"):
        run(replace(config, quant=QuantConfig(overrides={"down_proj": {"components": 2}})))
    start = replace(config.model, start="ptq")
    for quant in (QuantConfig(budget_bits=3.0), QuantConfig(overrides={"*.down_proj": {"components": 2}})):
        with pytest.raises(ValueError, match="model.start=ptq does not fit quant.weight=ternary, quant.components=2"):
            run(replace(config, quant=quant, model=start))
    assert not (tmp_path / "run").exists()


def test_a_format_for_one_matrix_a_layer_is_named_before_training(config: TrainConfig, tiny_model: Path) -> None:
    config = replace(config, export=ExportConfig(formats=["hf", "pt2"]))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    qat.convert(model, config.quant)
    assert unwritten(config, model, None) == []
    (said,) = unwritten(replace(config, quant=QuantConfig(budget_bits=2.5)), model, None)
    assert said.startswith("warning: export.formats=hf will not be written: quant.budget_bits gives layers a second")
