"""What the comparison of a GGUF file finds: planted faults, and real models in llama.cpp."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from gguf import GGUFReader
from gguf_samples import IDS, WINDOWS, byte_level, needs_llama_cpp, packed_model, save

import qat
from qat import QuantConfig
from qat.formats.gguf import architectures as gguf_models
from qat.formats.gguf import container as gguf_file
from qat.formats.gguf import read_back as gguf_verify
from qat.formats.gguf import stock, writing
from qat.formats.gguf import writing as gguf
from qat.formats.gguf.tokenizer import vocabulary
from qat.metrics.perplexity import windows


def test_one_wrong_bit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = stock.write

    def faulty(file: Path, *rest: object) -> None:
        write(file, *rest)  # type: ignore[arg-type]
        tensor = gguf_file.read(file).tensors["blk.1.attn_v.weight"]
        data = bytearray(file.read_bytes())
        at = data.index(tensor.data.tobytes()) + 2
        data[at] ^= 1 if data[at] & 3 != 2 else 2
        file.write_bytes(bytes(data))

    monkeypatch.setattr(stock, "write", faulty)
    with pytest.raises(
        ValueError, match="tensor 'blk.1.attn_v.weight' holds code 3|tensor blk.1.attn_v.weight was not read back"
    ):
        save(packed_model(), tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_stock_reader_agrees_on_types_that_it_knows(tmp_path: Path) -> None:
    info = save(packed_model(changes={"hidden_size": 256, "intermediate_size": 256}), tmp_path / "x.gguf", type="tq1_0")
    assert info["verification"]["stock_reader"] is True  # type: ignore[index]
    reader = GGUFReader(tmp_path / "x.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"TQ1_0", "F32"}


@needs_llama_cpp
def test_a_model_with_other_rows_is_found_by_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model()
    wrong = replace(gguf_models.ARCHITECTURES["llama"], row_order=lambda *about: None)  # without interleaving
    monkeypatch.setitem(gguf_models.ARCHITECTURES, "llama", wrong)
    with pytest.raises(ValueError, match="another model from the file than was packed: logits by 4"):
        save(model, tmp_path / "x.gguf", check=lambda file: gguf.read_back(file, model, IDS[:64][None], WINDOWS))


@needs_llama_cpp
def test_llama_cpp_splits_texts_alike_and_a_wrong_split_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model, tokenizer = packed_model(changes={"vocab_size": 261, "eos_token_id": 260}), byte_level(digits)
    info = save(model, tmp_path / "x.gguf", tokenizer=tokenizer)
    assert info["verification"]["texts"] > len(gguf_verify.TEXTS)  # type: ignore[index]
    monkeypatch.setattr(writing, "vocabulary", lambda *about: {**vocabulary(*about[:2]), "tokenizer.ggml.pre": "gpt-2"})
    with pytest.raises(ValueError, match="llama.cpp would read 'In 2024, 12345 people"):
        save(model, tmp_path / "x.gguf", tokenizer=tokenizer, pre_tokenizer="gpt-2")


@needs_llama_cpp
@pytest.mark.parametrize(("weight", "scale"), [("ternary", "float32"), ("binary", "float16")])
def test_stories260k(tmp_path: Path, shared: Path, weight: str, scale: str) -> None:
    from qat.config import DataConfig
    from qat.data import text_tokens

    source = shared / "models/stories260k"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    qat.convert(model, QuantConfig(weight=weight, scale_dtype=scale))
    qat.pack(model)
    batches = list(windows(text_tokens(str(shared / "data/tinystories/valid.txt"), tokenizer, DataConfig(), 4096), 512))
    info = gguf.save(
        model, tmp_path / "x.gguf", tokenizer, check=lambda file: gguf.read_back(file, model, batches[0][0][:2, :256], batches)
    )
    found = info["verification"]
    assert found["texts"] == len(gguf_verify.TEXTS) and found["perplexity_difference"] < 0.02
    assert re.search("from 172 to 192", info["padding"])


TEXT = "Alice was beginning to get very tired of sitting by her sister on the bank. "


@needs_llama_cpp
def test_glassllm_with_its_own_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("glassllm")
    from qat.config import ModelConfig
    from qat.models.hub import load_model, load_tokenizer

    config = ModelConfig(path="package://glassllm/weights/en.npz")
    model, tokenizer = load_model(config), load_tokenizer(config)
    qat.convert(model)
    qat.pack(model)
    ids = torch.tensor(tokenizer(TEXT * 12).input_ids)
    batches = list(windows(ids, 128))
    info = gguf.save(
        model, tmp_path / "x.gguf", tokenizer, check=lambda file: gguf.read_back(file, model, batches[0][0], batches)
    )
    assert info["verification"]["texts"] >= 1 and info["verification"]["perplexity_difference"] < 0.02
    again = load_tokenizer(ModelConfig(path=str(tmp_path / "x.gguf")))
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids and again.decode(ids) == tokenizer.decode(ids)
