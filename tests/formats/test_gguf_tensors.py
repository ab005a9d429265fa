"""Which type a tensor gets and why, what its scales and embeddings become, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_samples import IDS, WINDOWS, kinds, packed_model, save

from qat.formats.gguf import container as gguf_file
from qat.formats.gguf import i2s as gguf_i2s
from qat.formats.gguf import read_back as gguf_verify
from qat.formats.gguf import tensors as gguf_tensors
from qat.formats.gguf import writing as gguf
from qat.formats.llamacpp import questions as llamacpp


def test_auto_chooses_by_shape_and_says_why(tmp_path: Path) -> None:
    info = save(packed_model(changes={"intermediate_size": 256}), tmp_path / "x.gguf")
    found = kinds(tmp_path / "x.gguf")
    assert found["blk.0.ffn_down.weight"] == 35 and found["blk.0.ffn_up.weight"] == 42 and found["token_embd.weight"] == 0
    assert sorted(info["types"]) == [  # type: ignore[call-overload]
        "q2_0 for 12 tensors: only blocks of 64 fit (rows of 64 are no multiple of 256)",
        "tq2_0 for 2 tensors: rows of 256 are whole blocks of 256",
    ]
    assert gguf_file.read(tmp_path / "x.gguf").metadata["general.file_type"] == 41


def test_binary_takes_one_bit_where_rows_allow(tmp_path: Path) -> None:
    model = packed_model(weight="binary")
    save(model, tmp_path / "x.gguf")
    found = kinds(tmp_path / "x.gguf")
    assert found["blk.0.ffn_down.weight"] == 41 and found["blk.0.ffn_up.weight"] == 42


def test_padding_is_the_reason_where_a_binary_layer_takes_two_bits(tmp_path: Path) -> None:
    """An MLP of 176 is widened to 192; q1_0 fits the rows of 128, and not the zeros."""
    model = packed_model(changes={"hidden_size": 128, "intermediate_size": 176}, weight="binary")
    types = save(model, tmp_path / "x.gguf")["types"]
    assert "q1_0 for 8 tensors: binary, and rows of 128 are whole blocks of 128" in types  # type: ignore[operator]
    assert "q2_0 for 6 tensors: only blocks of 64 fit (binary, padded with zeros, which q1_0 has not)" in types  # type: ignore[operator]


def test_types_asked_for_by_name_that_do_not_fit(tmp_path: Path) -> None:
    for kind, message in (("tq1_0", "rows of 64 are no multiple of 256"), ("q1_0", "rows of 64 are no multiple of 128")):
        with pytest.raises(ValueError, match=f"does not fit {kind}: {message}"):
            save(packed_model(), tmp_path / "x.gguf", type=kind)
    with pytest.raises(ValueError, match="q1_0 holds no zero weights"):
        save(packed_model(changes={"hidden_size": 128}), tmp_path / "x.gguf", type="q1_0")
    with pytest.raises(ValueError, match="type='q4_0' is not allowed for gguf; choose one of auto, tq1_0"):
        save(packed_model(), tmp_path / "x.gguf", type="q4_0")
    assert list(tmp_path.iterdir()) == []


def test_hidden_widths_that_fit_no_block(tmp_path: Path) -> None:
    model = packed_model(changes={"hidden_size": 48, "num_attention_heads": 2})
    with pytest.raises(ValueError, match="does not fit any type: .*rows of 48 are no multiple of 64"):
        save(model, tmp_path / "x.gguf")


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_scales_of_every_granularity_are_kept_exactly(tmp_path: Path, granularity: str) -> None:
    group = {"group_size": 64} if granularity == "group" else {}
    model = packed_model("qwen2", granularity=granularity, scale_dtype="float16", **group)
    info = save(model, tmp_path / "x.gguf")
    assert info["scale_rounding"] == 0
    found = gguf_file.read(tmp_path / "x.gguf").float32("blk.1.ffn_down.weight")
    assert torch.equal(torch.tensor(found), model.get_submodule("model.layers.1.mlp.down_proj").dequantize())


def test_float32_scales_are_rounded_and_it_is_said(tmp_path: Path) -> None:
    info = save(packed_model(), tmp_path / "x.gguf")
    assert 0 < info["scale_rounding"] <= 2**-11  # type: ignore[operator]
    assert any("scales were rounded to float16" in line for line in gguf_verify.report(info))


def test_scales_outside_float16_are_refused(tmp_path: Path) -> None:
    for value in (1e-7, 1e5):
        model = packed_model()
        model.get_submodule("model.layers.0.mlp.up_proj").weight_scale.fill_(value)
        with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight has the scale 1e[-+]0\d, which float16 cannot hold"):
            save(model, tmp_path / "x.gguf")


def test_groups_smaller_than_a_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="groups of 32 with a scale each are no multiple of 64"):
        save(packed_model(granularity="group", group_size=32), tmp_path / "x.gguf")


@pytest.mark.parametrize(("kind", "order"), [("i2_s", "x86"), ("i2_s_arm", "arm")])
def test_i2_s_files(tmp_path: Path, kind: str, order: str) -> None:
    model = packed_model("qwen2", {"hidden_size": 128, "head_dim": 32})
    info = save(model, tmp_path / "x.gguf", type=kind)
    read = gguf_file.read(tmp_path / "x.gguf")
    tensor, layer = read.tensors["blk.0.ffn_up.weight"], model.get_submodule("model.layers.0.mlp.up_proj")
    assert tensor.kind == 36 and len(tensor.data) == 128 * 128 // 4 + 32 and read.metadata["general.file_type"] == 40
    assert tensor.data[:-32].tobytes() == gguf_i2s.encode(layer.codes().numpy(), 0.0, order)[:-32].tobytes()
    assert torch.equal(torch.tensor(read.float32("blk.0.ffn_up.weight", order)), layer.dequantize())
    assert "bitnet.cpp" in str(gguf.read_back(tmp_path / "x.gguf", model, IDS[None], WINDOWS)["why"])
    assert info["scale_rounding"] == 0
    with pytest.raises(ValueError, match="128 scales, and the type one a tensor"):
        save(packed_model("qwen2", {"hidden_size": 128}, granularity="channel"), tmp_path / "y.gguf", type=kind)


@pytest.mark.parametrize("floats", gguf_tensors.FLOATS)
def test_types_of_embeddings(tmp_path: Path, floats: str) -> None:
    model = packed_model(changes={"hidden_size": 256}, exclude="*down_proj")
    if floats == "q6_k" and llamacpp.version() is None:
        with pytest.raises(ValueError, match="llama-cpp-python is not installed"):
            save(model, tmp_path / "x.gguf", floats=floats)
        return
    if floats == "q6_k":
        with pytest.raises(ValueError, match="blk.0.ffn_down.weight has rows of 128, no multiple of the 256 of q6_k"):
            save(model, tmp_path / "x.gguf", floats=floats)
        model = packed_model(changes={"hidden_size": 256})
    save(model, tmp_path / "x.gguf", floats=floats)
    read = gguf_file.read(tmp_path / "x.gguf")
    number = gguf_tensors.FLOATS[floats]
    assert read.tensors["token_embd.weight"].kind == number and read.tensors["output_norm.weight"].kind == 0
    assert floats == "q6_k" or read.tensors["blk.0.ffn_down.weight"].kind == number
    exact = model.get_input_embeddings().weight.detach()
    limits = {"f32": 0, "f16": 1e-3, "bf16": 1e-2, "q8_0": 2e-2, "q6_k": 6e-2}
    assert (torch.tensor(read.float32("token_embd.weight")) - exact).abs().max() <= limits[floats] * exact.abs().max()


def test_embeddings_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = packed_model()
    model.get_input_embeddings().weight.data[3, 4] = 1e5
    with pytest.raises(ValueError, match="token_embd.weight has values beyond float16's range"):
        save(model, tmp_path / "x.gguf", floats="f16")
