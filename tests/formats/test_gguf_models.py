"""Architectures of GGUF: llama.cpp computes what PyTorch does, or the model is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from gguf_samples import IDS, MODELS, SMALL, WINDOWS, packed_model, save

import qat
from qat.formats.gguf import architectures as gguf_models
from qat.formats.gguf import container as gguf_file
from qat.formats.gguf import writing as gguf
from qat.formats.gguf.architectures.record import GELU_TANH, SIZES, rope_settings, sizes
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
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "no sliding window of 8"),
        ("llama", {"hidden_act": "gelu"}, "computes llama with silu, not with gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic' is not done"),
        ("gemma2", {"tie_word_embeddings": False}, "ties the head"),
        ("gemma2", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar=8"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types"),
        ("gemma2", {"final_logit_softcapping": None}, "uncapped"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "and by nothing else"),
        ("qwen3", {"attention_bias": True}, r"attention_bias=True is not done for gguf with qwen3: llama.cpp's qwen3 computes"),
        ("gemma2", {"attention_bias": True}, "attention_bias=True"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "does not cap"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias=False"),
        ("qwen2", {"is_causal": False}, "is_causal=False is not done for gguf with qwen2"),  # which no class declares
        ("gpt_neox", {"head_dim": 4}, "head_dim=4 is not done for gguf with gpt_neox, whose heads are"),
        ("llama", {"chunk_size_of_attention": 4, "is_encoder_decoder": True}, "is_encoder_decoder=True"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor=0.5",
        ),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'yarn' is not done for gguf with qwen2; done are default, linear",
        ),
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


def test_a_key_that_no_record_handles_is_refused_with_its_value() -> None:
    """What a later transformers adds to a configuration is not silently left out."""

    class Later(transformers.Qwen2Config):
        residual_multiplier: float = 1.0

    assert gguf_models.architecture(Later(**SMALL)).name == "qwen2"
    with pytest.raises(ValueError, match=r"residual_multiplier=0.5 is not done for gguf with qwen2: .* computes with 1.0"):
        gguf_models.architecture(Later(**SMALL, residual_multiplier=0.5))


def test_what_changes_no_number_is_allowed() -> None:
    config = transformers.LlamaConfig(**SMALL, attention_dropout=0.5, use_cache=False, pretraining_tp=2, unsloth_version="1")
    assert gguf_models.architecture(config).name == "llama"
    window = transformers.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=2, max_window_layers=9)
    assert set(window.layer_types) == {"full_attention"} and gguf_models.architecture(window).name == "qwen2"


def test_an_architecture_is_a_record_of_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """StarCoder 2, thrown away afterwards: settings, what they handle, a row; the writer compares every tensor."""

    def settings(config: Any) -> dict[str, Any]:
        return {
            **sizes(config, config.intermediate_size),
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_epsilon": config.norm_epsilon,
            "rope.dimension_count": config.hidden_size // config.num_attention_heads,
            **rope_settings(config),
        }

    config = transformers.Starcoder2Config(**{**SMALL, "hidden_size": 64, "intermediate_size": 64}, norm_epsilon=1e-4)
    model = transformers.Starcoder2ForCausalLM(config).eval()
    qat.convert(model)
    qat.pack(model)
    assert "'starcoder2' is not done" in str(gguf.unsupported(model))
    row = gguf_models.Architecture("starcoder2", GELU_TANH, settings, SIZES)
    monkeypatch.setitem(gguf_models.ARCHITECTURES, "starcoder2", row)
    assert "norm_epsilon=0.0001 is not done" in str(gguf.unsupported(model))
    row = replace(row, handles=SIZES | {"norm_epsilon", "sliding_window"})
    monkeypatch.setitem(gguf_models.ARCHITECTURES, "starcoder2", row)
    info = gguf.save(model, tmp_path / "x.gguf")
    assert info["verification"]["tensors"] == len(gguf_file.read(tmp_path / "x.gguf").tensors) > 20
    assert gguf_file.read(tmp_path / "x.gguf").metadata["starcoder2.attention.layer_norm_epsilon"] == pytest.approx(1e-4)
