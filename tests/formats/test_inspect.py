"""`python -m qat.inspect`: what each kind is said to be, and the first difference of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import qat
from qat import inspect as verb
from qat.conversion.layers import packed_layers
from qat.formats.bitnet import writing as hf
from qat.formats.packed import folder as packed

TINY = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 43,  # padded to 44 by hf
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q = "model.layers.0.self_attn.q_proj"


def packed_model(layout: str = "2bit", **quant: object) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    qat.convert(model, qat.QuantConfig(**quant))
    qat.pack(model, layout=layout)
    return model


def test_a_packed_folder(tmp_path: Path) -> None:
    model = packed_model("base3", granularity="group", group_size=1)
    packed.save(model, tmp_path / "x")
    about = verb.inspect(str(tmp_path / "x"))
    layers = packed_layers(model)
    weights = sum(layer.codes().numel() for layer in layers.values())
    stored = sum(layer.packed.numel() + 4 * layer.weight_scale.numel() for layer in layers.values())
    assert about["kind"] == "packed folder of qat" and "ternary absmean per group of 1, base3" in about["convention"]
    assert about["quantized layers"] == 7 and about["weights"] == weights == 3 * 32 * 43 + 2 * 32 * 32 + 2 * 16 * 32
    assert about["quantized bytes"] == stored and about["bits per weight"] == round(8 * stored / weights, 4)
    zeros = sum(int((layer.codes() == 0).sum()) for layer in layers.values())
    assert about["zero fraction"] == round(zeros / weights, 4)
    assert about["other tensors"] == {"float32": {"count": 5, "bytes": 4 * (2 * 32 * 32 + 3 * 32)}}
    assert about["file bytes"] == (tmp_path / "x/model.safetensors").stat().st_size


def test_every_kind_says_what_it_is(tmp_path: Path) -> None:
    model = packed_model()
    packed.save(model, tmp_path / "run/packed")
    (tmp_path / "run/result.json").write_text(json.dumps({"status": "done", "recipe": "r", "perplexity": {"packed": 4.5}}))
    packed.save_state(model, tmp_path / "state.safetensors")
    hf.save(model, tmp_path / "divides")
    hf.save(model, tmp_path / "multiplies", linear_class="autobitlinear")
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "plain")
    said = {
        "run": ("a run's packed folder of qat", "2bit"),
        "run/packed": ("packed folder of qat", "ternary absmean per tensor"),
        "run/packed/model.safetensors": ("packed folder of qat", "multiplies"),
        "state.safetensors": ("tensors of a module packed by qat", "2bit"),
        "divides": ("stock bitnet folder", "divides (1 / mean|W|)"),
        "multiplies": ("stock bitnet folder", "multiplies, the bias too"),
        "plain": ("safetensors, full precision", "no codes"),
    }
    for path, (kind, convention) in said.items():
        about = verb.inspect(str(tmp_path / path))
        assert about["kind"] == kind and convention in about["convention"] and about["readers"], path
    assert verb.inspect(str(tmp_path / "run"))["perplexity, packed"] == "4.5"


def test_a_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    data = gguf.quantize(torch.randn(4, 256).numpy(), gguf.GGMLQuantizationType.TQ2_0)
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=gguf.GGMLQuantizationType.TQ2_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    about = verb.inspect(str(tmp_path / "x.gguf"))
    assert about["kind"] == "GGUF" and about["architecture"] == "llama"
    assert (about["types"], about["quantized layers"], about["bits per weight"]) == ("1 TQ2_0", 1, 8 * 66 / 256)
    assert about["other tensors"] == {} and "1 layers have the same codes" in verb.verify(*[str(tmp_path / "x.gguf")] * 2)
    (tmp_path / "x.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:40])
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        verb.inspect(str(tmp_path / "x.gguf"))


def test_verify_across_formats_and_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed.save(packed_model(), tmp_path / "a")
    packed.save(packed_model("base3"), tmp_path / "b")
    hf.save(packed_model(), tmp_path / "divides")
    hf.save(packed_model(), tmp_path / "multiplies", linear_class="autobitlinear")
    for other in ("b", "divides", "multiplies"):
        assert verb.main([str(tmp_path / "a"), "--verify", str(tmp_path / other)]) == 0
        assert "equal: 7 layers have the same codes" in capsys.readouterr().out
    assert verb.main([str(tmp_path / "a"), "--json", "--verify", str(tmp_path / "b")]) == 0
    assert json.loads(capsys.readouterr().out)["verify"].startswith("equal")


def test_verify_names_the_first_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed.save(packed_model(), tmp_path / "a")
    hf.save(packed_model(), tmp_path / "b")
    file = tmp_path / "b/model.safetensors"
    whole = load_file(file)

    def other(**changes: torch.Tensor) -> str:
        save_file({**whole, **changes}, file)
        assert verb.main([str(tmp_path / "a"), "--verify", str(tmp_path / "b")]) == 2
        return capsys.readouterr().err

    codes = whole[f"{Q}.weight"].clone()
    old = int(codes[3, 5] >> 4 & 3)
    codes[3, 5] = int(codes[3, 5]) & ~(3 << 4) | (old + 1) % 3 << 4
    expected = f"codes differ in 1 places, the first is {Q}[{2 * 8 + 3}, 5]: {old - 1} and {(old + 1) % 3 - 1}"
    assert expected in other(**{f"{Q}.weight": codes})
    assert f"scales differ, most of all {Q}[0, 0]" in other(**{f"{Q}.weight_scale": whole[f"{Q}.weight_scale"] * 1.01})
    del whole[f"{Q}.weight_scale"]
    assert f"the layer {Q} and 0 more are in one of the two only" in other()
    AutoModelForCausalLM.from_config(LlamaConfig(**TINY)).save_pretrained(tmp_path / "plain")
    assert verb.main([str(tmp_path / "a"), "--verify", str(tmp_path / "plain")]) == 2
    assert "has no quantized layers that could be compared" in capsys.readouterr().err


WIDE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, Any] = {  # rows interleaved; in other names; in three blocks; in no other order, from Conv1D
    "llama": lambda: transformers.LlamaConfig(**WIDE, num_key_value_heads=2),
    "qwen2": lambda: transformers.Qwen2Config(**WIDE, num_key_value_heads=2),
    "gptneox": lambda: transformers.GPTNeoXConfig(**{**WIDE, "intermediate_size": 128}),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4),
}


def packed_family(family: str, exclude: str | None = None, **quant: object) -> nn.Module:
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    qat.convert(model, qat.QuantConfig(**quant), exclude=exclude)
    qat.pack(model)
    return model


@pytest.mark.parametrize("quant", [{}, {"granularity": "channel"}, {"weight": "binary"}, {"scale_dtype": "float16"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_verify_a_folder_with_a_gguf_file(tmp_path: Path, family: str, quant: dict[str, object]) -> None:
    """All codes, though llama.cpp has other names, rows in another order and padded widths; scales as float16 has them."""
    from qat.formats.gguf import writing as gguf

    model = packed_family(family, **quant)
    packed.save(model, tmp_path / "a")
    gguf.save(model, tmp_path / "b.gguf", type="q2_0")
    for pair in (["a", "b.gguf"], ["b.gguf", "a"]):
        said = verb.verify(*[str(tmp_path / name) for name in pair])
        assert said.startswith(f"equal: {len(packed_layers(model))} layers have the same codes")
        difference = float(said.partition("at most ")[2].split()[0])
        assert difference == 0 if "scale_dtype" in quant else 0 < difference < 5e-4


def test_verify_a_gguf_file_with_every_kind_of_folder(tmp_path: Path) -> None:
    from qat.formats.gguf import writing as gguf

    model = packed_family("llama")
    packed.save(model, tmp_path / "run/packed")
    (tmp_path / "run/result.json").write_text('{"status": "done"}')
    hf.save(model, tmp_path / "divides")
    hf.save(model, tmp_path / "multiplies", linear_class="autobitlinear")
    for kind in ("q2_0", "i2_s_arm"):
        gguf.save(model, tmp_path / f"{kind}.gguf", type=kind)
    for folder in ("run", "divides", "multiplies"):
        assert "14 layers have the same codes" in verb.verify(str(tmp_path / "q2_0.gguf"), str(tmp_path / folder))
    assert "at most 0.0e+00" in verb.verify(str(tmp_path / "i2_s_arm.gguf"), str(tmp_path / "run"))
    about = verb.inspect(str(tmp_path / "i2_s_arm.gguf"))
    assert about["types"] == "14 I2_S" and about["readers"] == "bitnet.cpp"
    assert about["convention"] == "one float32 scale a tensor, behind its codes in the order of arm"


def test_verify_groups_of_other_widths(tmp_path: Path) -> None:
    """A scale for 128 weights in the folder is two blocks of 64 in the file."""
    from qat.formats.gguf import writing as gguf

    pytest.importorskip("gguf")
    torch.manual_seed(0)
    sizes = {**WIDE, "hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval()
    qat.convert(model, qat.QuantConfig(granularity="group", group_size=128))
    qat.pack(model)
    packed.save(model, tmp_path / "a")
    gguf.save(model, tmp_path / "b.gguf", type="q2_0")
    assert "14 layers have the same codes" in verb.verify(str(tmp_path / "a"), str(tmp_path / "b.gguf"))
    model.model.layers[1].mlp.up_proj.weight_scale[5, 1] *= 1.002
    packed.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match=r"scales differ, most of all blk.1.ffn_up\[5, 128\]"):
        verb.verify(str(tmp_path / "a"), str(tmp_path / "b.gguf"))


def test_verify_finds_a_difference_behind_other_names_and_rows(tmp_path: Path) -> None:
    from qat.formats.gguf import writing as gguf

    model = packed_family("llama")
    gguf.save(model, tmp_path / "b.gguf")
    layer = model.model.layers[1].self_attn.k_proj  # 2 heads of 16: row 8, in the second half of its head, is row 1 there
    codes = layer.codes()
    old = int(codes[8, 5])
    codes[8, 5] = new = (old + 2) % 3 - 1
    layer.packed = qat.ops.pack_ternary(codes)
    packed.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match=rf"codes differ in 1 places, the first is blk.1.attn_k\[1, 5\]: {new} and {old}"):
        verb.verify(str(tmp_path / "a"), str(tmp_path / "b.gguf"))


def test_what_cannot_be_compared_with_a_gguf_file(tmp_path: Path) -> None:
    from qat.formats.gguf import container as gguf_file
    from qat.formats.gguf import stock
    from qat.formats.gguf import writing as gguf

    gguf.save(packed_family("llama"), tmp_path / "llama.gguf")
    packed.save(packed_family("qwen2"), tmp_path / "qwen2")
    packed.save_state(packed_family("llama"), tmp_path / "state.safetensors")
    gguf.save(packed_family("llama"), tmp_path / "ours.gguf", type="i2_s_arm")
    whole = gguf_file.read(tmp_path / "ours.gguf")
    metadata = {k: v for k, v in whole.metadata.items() if k not in ("qat.i2_s", "general.architecture")}
    stock.write(tmp_path / "i2_s.gguf", "llama", metadata, whole.tensors)
    packed.save(packed_family("llama", exclude="*.1.self_attn.q_proj"), tmp_path / "fewer")
    for one, two, message in (
        ("llama.gguf", "qwen2", "the GGUF file is a llama, but the packed folder of qat would be a qwen2 in GGUF"),
        ("state.safetensors", "llama.gguf", "the tensors of a module packed by qat have no config.json"),
        ("i2_s.gguf", "qwen2", "has no quantized layers that could be compared"),
        ("fewer", "llama.gguf", "the layer blk.1.attn_q and 0 more are in one of the two only: .*llama.gguf"),
    ):
        with pytest.raises(ValueError, match=message):
            verb.verify(str(tmp_path / one), str(tmp_path / two))


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.csv").write_text("no model")
    (tmp_path / "cut.safetensors").write_text("no model")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text('{"status": "failed: NaN"}')
    for path, message in (
        ("none", "no such file"),
        ("empty", "is none of: a run's folder"),
        ("text.csv", "is none of: a run's folder"),
        ("cut.safetensors", "not a whole safetensors file"),
        ("run", "its status is 'failed: NaN'"),
    ):
        assert verb.main([str(tmp_path / path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("qat.inspect:") and error.count("\n") == 1 and message in error
