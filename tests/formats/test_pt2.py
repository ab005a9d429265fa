"""`--format pt2`: written, run by a process without transformers, and compared; what differs or is in the way is refused."""

from __future__ import annotations

import copy
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

import qat
from qat.export import __main__ as verb
from qat.formats.packed import folder as packed
from qat.formats.pt2 import program as aoti
from qat.formats.pt2 import writing as pt2
from qat.metrics.perplexity import windows

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, max_position_embeddings=64),
    "gemma2": Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=64),
    "gpt2": GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
IDS = torch.randint(40, (300,), generator=torch.Generator().manual_seed(0))
WINDOWS = list(windows(IDS, 64))


def packed_model(config: PretrainedConfig, **quant: object) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval().requires_grad_(False)
    qat.convert(model, qat.QuantConfig(**quant))
    qat.pack(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_gives_the_model_s_logits_to_the_bit(family: str, tmp_path: Path) -> None:
    model = packed_model(FAMILIES[family], granularity="channel", rms_norm_eps=0.01 if family == "qwen2" else None)
    info = pt2.save(model, tmp_path / "a.pt2")
    run = aoti.load(tmp_path / "a.pt2")
    for ids in (IDS[:64].reshape(4, 16), IDS[None, :64], IDS[None, :2]):
        assert torch.equal(run(ids), model(input_ids=ids, use_cache=False).logits)
    assert info["kind"] == "exported" and info["bytes"] == (tmp_path / "a.pt2").stat().st_size and info["verification"] == {}
    whole = (tmp_path / "a.pt2").read_bytes()
    for folder in (tmp_path, Path(torch.__file__).parents[1], Path(qat.__file__).parent):
        assert str(folder).encode() not in whole


def test_the_verb_writes_and_compares(
    tiny_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    qat.convert(model)
    qat.pack(model)
    packed.save(model, tmp_path / "run/packed", tokenizer=AutoTokenizer.from_pretrained(tiny_model))
    arguments = ["--out", str(tmp_path / "m.pt2"), "--text", str(text_file), "--max-tokens", "500"]
    assert verb.main([str(tmp_path / "run"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'm.pt2'} (exported, " in printed and "on the first 500 tokens of text.txt" in printed
    assert "(relative difference 0.0e+00); logits differ by 0.0e+00" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt2", "run"]
    assert verb.main([str(tmp_path / "run"), "--format", "hf", "--kind", "compiled", *arguments]) == 2
    assert "the format hf is written to a folder, not to m.pt2" in capsys.readouterr().err
    assert verb.main([str(tmp_path / "run"), "--out", str(tmp_path / "hf"), "--kind", "compiled"]) == 2
    assert "--kind does not fit --format hf, only pt2" in capsys.readouterr().err


def test_another_model_is_found_and_leaves_nothing(tmp_path: Path) -> None:
    model, other = packed_model(FAMILIES["llama"]), packed_model(FAMILIES["llama"])
    other.model.layers[1].mlp.up_proj.weight_scale *= 1.01
    with pytest.raises(ValueError, match="the .pt2 file is not the model that was packed: logits differ by .* .allowed 1e-05."):
        pt2.save(model, tmp_path / "a.pt2", check=lambda new: pt2.read_back(new, other, IDS[None, :64], WINDOWS))
    assert list(tmp_path.iterdir()) == []


def test_only_our_own_file_is_replaced(tmp_path: Path) -> None:
    model = packed_model(FAMILIES["llama"])
    pt2.save(model, tmp_path / "a.pt2")
    first = (tmp_path / "a.pt2").stat().st_ino
    pt2.save(model, tmp_path / "a.pt2")
    assert (tmp_path / "a.pt2").stat().st_ino != first
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "b.pt2")
    with pytest.raises(ValueError, match="b.pt2 exists and was not written by an export of qat"):
        pt2.save(model, tmp_path / "b.pt2")


def test_what_it_cannot_hold(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="the pt2 format cannot hold this model: Sequential has no quantized layers"):
        pt2.save(plain, tmp_path / "a.pt2")
    qat.convert(plain)
    with pytest.raises(ValueError, match="call qat.pack first"):
        pt2.save(plain, tmp_path / "a.pt2")


def _rewritten(source: Path, target: Path, **entries: bytes) -> Path:
    """A copy with other entries, by the last part of their names; not sealed, as whoever forges a file would leave it."""
    entries = {"writer": b"qat", **entries}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, entries.pop(info.filename.rpartition("/")[2].replace(".", "_"), old.read(info)))
        for name, data in entries.items():
            new.writestr(f"a/{name}", data)
    return target


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("ran"),))


def test_a_hostile_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pt2.save(packed_model(FAMILIES["llama"]), tmp_path / "a.pt2")
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        program = archive.read("a/models/model.json").decode()
        config = archive.read("a/data/weights/model_weights_config.json").decode()
    symbol = re.search(r"Symbol\('s\d+', positive=True, integer=True\)", program)
    assert symbol and '"use_pickle": false' in config and "torch.ops.aten.add.Tensor" in program
    aoti.load(_rewritten(tmp_path / "a.pt2", tmp_path / "same.pt2"))
    for message, entries in {
        "is no expression of sizes": {"model_json": program.replace(symbol[0], "__import__('pathlib').Path('ran').touch()")},
        "is no expression": {"model_json": program.replace(symbol[0], "Symbol('s1').func.mro()")},
        "which is no operation": {"model_json": program.replace("torch.ops.aten.add.Tensor", "torch.hub.load")},
        "guards, which are Python code": {"model_json": program.replace('"guards_code": []', '"guards_code": ["ran()"]')},
        "asks for a pickle": {"model_weights_config_json": config.replace('"use_pickle": false', '"use_pickle": true', 1)},
        "none that an export writes": {"custom_obj_0": "x"},
    }.items():
        file = _rewritten(tmp_path / "a.pt2", tmp_path / "b.pt2", **{name: text.encode() for name, text in entries.items()})
        with pytest.raises(ValueError, match=message):
            aoti.load(file)
    with pytest.raises(ValueError, match="is no .pt2 file"):
        aoti.load(_rewritten(tmp_path / "a.pt2", tmp_path / "b.pt2", model_pt=pickle.dumps(_Evil())))
    assert not (tmp_path / "ran").exists()
