"""The verb `export --ptq`: a pretrained model quantized without training, written, read back, and measured."""

from pathlib import Path

import pytest
import torch

import qat
from qat.export import __main__ as verb
from qat.formats.packed import folder as packed
from qat.models.any import load


def arguments(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    return [str(model), "--ptq", "--calibration", str(text), "--calibration-tokens", "2048", "--out", str(out), *more]


def test_a_packed_folder_without_training(tiny_model, text_file, tmp_path, capsys):
    """Read back to the bit; settings may stand anywhere; the weights are the model's own beside the layers."""
    more = ("--format", "packed", "granularity=channel", "quant.scale_dtype=bfloat16")
    assert verb.main(arguments(tiny_model, text_file, tmp_path / "out", *more)) == 0
    printed = capsys.readouterr().out
    assert "calibrated on 2,048 tokens in" in printed and "not trained" in printed
    assert "held-out tokens of text.txt: perplexity" in printed or "perplexity on" in printed
    assert "packed folder, read back with equal logits" in printed and "14 of 15 linear layers converted" in printed
    model = load(str(tmp_path / "out")).model
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, qat.PackedBitLinear) and layer.config.granularity == "channel"
    assert torch.equal(layer.weight_scale, layer.weight_scale.bfloat16().float())
    assert "calibrated on 2,048 tokens" in str(packed.read_extra(tmp_path / "out")["card"])


@pytest.mark.parametrize("out, format", [("hf", "hf"), ("model.pt2", "pt2")])
def test_other_formats_are_read_back(tiny_model, text_file, tmp_path, capsys, out, format):
    """By their stock readers, as after training."""
    assert verb.main(arguments(tiny_model, text_file, tmp_path / out)) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / out).exists() and "calibrated on 2,048 tokens" in printed and "full precision," in printed


def test_what_cannot_be_is_said_before_anything_is_calibrated(tiny_model, text_file, tmp_path, capsys, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr("qat.calibration.compensation.compensate", never)
    short = tmp_path / "short.txt"
    short.write_text("the cat sat.")
    out = tmp_path / "out"
    (tmp_path / "run/packed").mkdir(parents=True)
    cases = [
        (arguments(tiny_model, tmp_path / "none.txt", out), "none.txt"),
        (arguments(tiny_model, short, out), "short.txt has 12 tokens, of which the last 1 are held out: too few for 32 windows"),
        ([str(tiny_model), "--ptq", "--out", str(out)], "--calibration FILE"),
        (arguments(tiny_model, text_file, out, "granularity=row"), "quant.granularity='row' is not allowed"),
        (arguments(tiny_model, text_file, out, "trainer.max_steps=3"), "trainer.max_steps=3 is not allowed with --ptq"),
        (arguments(tiny_model, text_file, out, "granularity=channel"), "the format hf cannot hold this model"),
        (arguments(tiny_model, text_file, out, "--format", "packed", "--type", "q2_0"), "--type does not fit --format packed"),
        (arguments(tmp_path / "run", text_file, out), "is a run, whose model is quantized already"),
        ([str(tiny_model), "--out", str(out), "granularity=channel"], "granularity=channel belongs to --ptq"),
        ([str(tiny_model), "--out", str(out), "--calibration", str(text_file)], "--calibration belongs to --ptq"),
        ([str(tiny_model), "--out", str(out), "--format", "packed"], "format='packed' is not known"),
    ]
    for given, message in cases:
        assert verb.main(given) == 2
        error = capsys.readouterr().err
        assert error.startswith("qat.export:") and error.count("\n") == 1 and message in error, error
    assert not out.exists()


def test_a_packed_model_is_not_quantized_again(tiny_model, text_file, tmp_path, capsys):
    assert verb.main(arguments(tiny_model, text_file, tmp_path / "first", "--format", "packed")) == 0
    assert verb.main(arguments(tmp_path / "first", text_file, tmp_path / "second", "--format", "packed")) == 2
    assert "already quantized (quant_method=qat)" in capsys.readouterr().err


def test_a_real_model_without_training(shared, tmp_path, monkeypatch, capsys):
    """Stories260k, per channel: from perplexity in the hundreds to one in the twenties."""
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    text = shared / "data/tinystories"
    more = ["--text", str(text / "valid.txt"), "--max-tokens", "4096", "--format", "packed", "granularity=channel"]
    given = [
        str(shared / "models/stories260k"),
        "--ptq",
        "--calibration",
        str(text / "train.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert verb.main([*given, *more]) == 0
    line = next(one for one in capsys.readouterr().out.splitlines() if one.startswith("perplexity on the first 4,096 tokens"))
    full, converted, calibrated = (float(part.split()[0]) for part in line.partition(": ")[2].split(", "))
    assert full == 5.081 and converted > 300 and calibrated < 24
