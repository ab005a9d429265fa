"""Whole GGUF files: padding, heads, what is in the way, and what a failure leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from gguf_samples import IDS, SMALL, WINDOWS, kinds, packed_model, save

import qat
from qat.conversion.layers import packed_layers
from qat.formats.gguf import container as gguf_file
from qat.formats.gguf import stock
from qat.formats.gguf import writing as gguf
from qat.formats.llamacpp import questions as llamacpp


def test_mlps_are_padded_and_compute_the_same(tmp_path: Path) -> None:
    model = packed_model("qwen2", {"intermediate_size": 90}, granularity="channel")
    info = save(model, tmp_path / "x.gguf")
    read = gguf_file.read(tmp_path / "x.gguf")
    assert "from 90 to 128" in str(info["padding"]) and read.metadata["qwen2.feed_forward_length"] == 128
    layer = model.get_submodule("model.layers.0.mlp")
    up, down = read.float32("blk.0.ffn_up.weight"), read.float32("blk.0.ffn_down.weight")
    assert not up[90:].any() and not down[:, 90:].any()
    torch.testing.assert_close(torch.from_numpy(up[:90].copy()), layer.up_proj.dequantize(), rtol=2**-11, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_quantized_head_is_written_as_such(tmp_path: Path, name: str) -> None:
    model = packed_model(name, {"tie_word_embeddings": False}, include=["*layers*", "lm_head"])
    info = save(model, tmp_path / "x.gguf")
    assert "lm_head" in packed_layers(model) and kinds(tmp_path / "x.gguf")["output.weight"] == 42
    if llamacpp.version():
        assert gguf.read_back(tmp_path / "x.gguf", model, IDS[:64][None], WINDOWS)["logits_difference"] < 0.03, info


def test_unpacked_models_are_refused(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match="no quantized layers"):
        save(model, tmp_path / "x.gguf")
    qat.convert(model)
    with pytest.raises(ValueError, match="q_proj is not packed yet; call qat.pack first"):
        save(model, tmp_path / "x.gguf")


def test_a_foreign_file_is_not_overwritten_and_ours_is(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF of somebody else")
    with pytest.raises(ValueError, match="was not written by an export of qat"):
        save(packed_model(), file)
    file.unlink()
    save(packed_model(), file)
    save(packed_model(weight="binary"), file)
    assert json.loads(gguf_file.read(file).metadata["qat.quant"])["weight"] == "binary"
    with pytest.raises(ValueError, match="does not end in .gguf"):
        save(packed_model(), tmp_path / "x")


def test_a_failed_check_leaves_no_file(tmp_path: Path) -> None:
    def fail(file: Path) -> dict[str, object]:
        assert file.exists()
        raise ValueError("differs")

    with pytest.raises(ValueError, match="differs"):
        save(packed_model(), tmp_path / "x.gguf", check=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, *rest: object) -> None:
        file.write_bytes(b"GGUF")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stock, "write", full)
    with pytest.raises(ValueError, match="cannot write .*x.gguf: .*No space left"):
        save(packed_model(), tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []
