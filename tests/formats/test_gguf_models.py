"""Architectures of GGUF: llama.cpp computes what PyTorch does, or the model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from gguf_samples import IDS, MODELS, SMALL, WINDOWS, packed_model, save

from qat.formats.gguf import architectures as gguf_models
from qat.formats.gguf import container as gguf_file
from qat.formats.gguf import writing as gguf
from qat.formats.llamacpp import questions as llamacpp


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_in_llama_cpp(tmp_path: Path, name: str) -> None:
    """Without llama.cpp the tensors alone are compared; with it, logits must come out as PyTorch's."""
    model = packed_model(name)
    info = save(model, tmp_path / "x.gguf")
    assert info["verification"]["tensors"] == len(gguf_file.read(tmp_path / "x.gguf").tensors)  # type: ignore[index]
    if llamacpp.version() is None:
        pytest.skip("llama-cpp-python is not installed: make llama-cpp")
    found = gguf.read_back(tmp_path / "x.gguf", model, IDS[:64][None], WINDOWS)
    assert found["logits_difference"] < 0.03, found  # 0.46 with llama's heads in the wrong order


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "no sliding window of 8"),
        ("llama", {"hidden_act": "gelu"}, "computes llama with silu, not with gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic' is not done"),
        ("gemma2", {"tie_word_embeddings": False}, "ties the head"),
        ("gemma2", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar=8"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types"),
        ("gemma2", {"final_logit_softcapping": None}, "uncapped"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "and by nothing else"),
        ("qwen3", {"attention_bias": True}, "no biases"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, name: str, changes: dict[str, object], message: str
) -> None:
    model = packed_model(name, changes)
    assert message in str(gguf.unsupported(model))
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_architectures_that_are_not_done_are_refused_by_name() -> None:
    config = transformers.OlmoConfig(**SMALL)
    with pytest.raises(ValueError, match="'olmo' is not done for gguf; done are llama, mistral"):
        gguf_models.architecture(config)


def test_sub_norms_have_no_place() -> None:
    names = gguf_models.Names(gguf_models.ARCHITECTURES["llama"], 2)
    assert names["model.layers.1.mlp.down_proj.weight"] == "blk.1.ffn_down.weight"
    with pytest.raises(ValueError, match=r"llama in llama.cpp has no place for model.layers.1.mlp.ffn_sub_norm.weight"):
        names["model.layers.1.mlp.ffn_sub_norm.weight"]


def test_llama_heads_are_interleaved() -> None:
    order = gguf_models.ARCHITECTURES["llama"].row_order("model.layers.0.self_attn.k_proj", 8, transformers.LlamaConfig(**SMALL))
    assert order is not None and order.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]  # 2 heads of 4
    qwen = gguf_models.ARCHITECTURES["qwen2"]
    assert qwen.row_order("model.layers.0.self_attn.k_proj", 8, transformers.Qwen2Config(**SMALL)) is None
