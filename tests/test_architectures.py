"""Tiny random models of each architecture: every converted weight trains, and packing changes no logit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qat
from qat import QuantConfig
from qat.conversion import bitlinears, set_lambda

transformers = pytest.importorskip("transformers")

DECODER = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
HEAD_DIM = {**DECODER, "head_dim": 8}
ENCODER = {key: DECODER[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
MOE = {**DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}

# name -> config class, model class, config, converted layers of both blocks
DENSE: dict[str, tuple[str, str, dict[str, object], int]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER, 14),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**DECODER, "tie_word_embeddings": True}, 14),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", HEAD_DIM, 14),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", HEAD_DIM, 14),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", HEAD_DIM, 14),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 1},
        8,
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {key: value for key, value in DECODER.items() if key != "num_key_value_heads"},
        8,
    ),
    "bert": ("BertConfig", "BertForMaskedLM", {**ENCODER, "vocab_size": 32, "max_position_embeddings": 16}, 13),
    "vit": ("ViTConfig", "ViTForImageClassification", {**ENCODER, "image_size": 8, "patch_size": 4, "num_labels": 3}, 12),
}
EXPERTS: dict[str, tuple[str, str, dict[str, object], int]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, 8),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**MOE, "num_experts": 4, "decoder_sparse_step": 1}, 14),
}


def build(config_class: str, model_class: str, config: dict[str, object]) -> nn.Module:
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    if model.main_input_name == "pixel_values":
        return model(pixel_values=torch.randn(2, 3, 8, 8)).logits
    return model(input_ids=torch.randint(1, 32, (2, 8))).logits


def assert_trains_and_packs(model: nn.Module, count: int, **options: object) -> qat.Conversion:
    full = logits(model).detach()
    record = qat.convert(model, **options)
    assert len(record.converted) == count, record.summary()
    set_lambda(model, 0)
    torch.testing.assert_close(logits(model), full)
    set_lambda(model, 1)
    before = {name: layer.weight.detach().clone() for name, layer in bitlinears(model)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    logits(model).log_softmax(-1)[..., 0].sum().neg().backward()
    assert [name for name, layer in bitlinears(model) if not layer.weight.grad.any()] == []
    optimizer.step()
    assert [name for name, layer in bitlinears(model) if torch.equal(layer.weight, before[name])] == []
    with torch.no_grad():
        trained = logits(model)
        assert trained.isfinite().all() and (trained - full).abs().max() > 1e-4
        qat.pack(model)
        assert torch.equal(logits(model), trained)
    return record


@pytest.mark.parametrize("name", DENSE)
def test_every_converted_weight_trains_and_packing_changes_no_logit(name: str) -> None:
    *classes, config, count = DENSE[name]
    record = assert_trains_and_packs(build(*classes, config), count)
    heads = {"bert": "cls.predictions.decoder", "vit": "classifier"}
    assert heads.get(name, "lm_head") in record.skipped


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_refused_by_name_and_the_rest_trains_once_excluded(name: str) -> None:
    *classes, config, count = EXPERTS[name]
    model = build(*classes, config)
    message = r"model.layers.0.mlp.experts \(\w+Experts\) stores 4 expert matrices as the one 3-D parameter 'gate_up_proj'"
    with pytest.raises(ValueError, match=message):
        qat.convert(model)
    record = assert_trains_and_packs(model, count, exclude="*experts")
    assert "model.layers.1.mlp.experts.down_proj" in record.skipped
    assert any("mlp.gate" in skipped for skipped in record.skipped)


def test_per_channel_binary_llama_trains_and_packs_too() -> None:
    *classes, config, count = DENSE["llama"]
    assert_trains_and_packs(build(*classes, config), count, config=QuantConfig(weight="binary", granularity="channel"))
