"""The verb `export`: the formats it knows, errors, and a real model written and read back."""

import json

import pytest
import torch
from folder_samples import packed_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import qat
from qat.export import __main__ as verb
from qat.formats import FORMATS, get_format
from qat.formats.bitnet import writing as hf
from qat.formats.packed import folder as packed


def test_formats():
    assert get_format("hf") is hf and list(FORMATS) == ["hf", "gguf", "pt2"]
    with pytest.raises(ValueError, match="choose one of hf, gguf, pt2"):
        get_format("onnx")


def test_errors_of_the_verb_are_one_line(capsys, tmp_path, llama):
    (tmp_path / "empty").mkdir()
    packed.save(packed_model(granularity="channel")[0], tmp_path / "channel")
    for run, message in (("none", "no such folder"), ("empty", "neither the folder of a finished run"), ("channel", "tokenizer")):
        assert verb.main([str(tmp_path / run), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("qat.export:") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_export_of_a_run(shared, capsys, tmp_path, monkeypatch):
    """Stories260k, converted without training: the verb writes, reads back in a subprocess, and prints both."""
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    source = shared / "models/stories260k"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    record = qat.convert(model)
    qat.pack(model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    packed.save(model, tmp_path / "run/packed", record, tokenizer, {"card": {"recipe": "stories260k"}})
    (tmp_path / "run/result.json").write_text(json.dumps({"perplexity": {"packed": 1500.0}}))
    text = str(shared / "data/tinystories/valid.txt")
    arguments = [str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--text", text, "--max-tokens", "4096"]
    assert verb.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "on the first 4,096 tokens of valid.txt: perplexity 1" in printed and "520,064 in bf16" in printed
    assert "the earlier export there is replaced" not in printed
    assert verb.main(arguments) == 0
    assert "the earlier export there is replaced\n" in capsys.readouterr().out
    readme = (tmp_path / "out/README.md").read_text()
    assert "| packed | 1500 |" in readme and "| recipe | stories260k |" in readme
