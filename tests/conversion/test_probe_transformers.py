"""The probe on models of transformers: cached steps, towers of another modality, frozen models."""

from __future__ import annotations

import pytest
import torch
from tiny import SIZES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, LlamaConfig

import qat
from qat.conversion.probe import NOT_CALLED


def language_model(kind: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).eval()


IDS = torch.randint(3, 30, (1, 12), generator=torch.Generator().manual_seed(1))
STATE = {"state_size": 16, "num_heads": 8, "head_dim": 8, "n_groups": 1}


def test_a_cached_step_is_compared_with_the_full_forward() -> None:
    assert qat.convert(language_model("llama"), probe=IDS).probe["cached"] is True
    record = qat.convert(language_model("mamba2", **STATE), probe={"input_ids": IDS})
    assert record.probe["cached"] == "its forward returns no past_key_values"
    broken = language_model("llama")
    forward = broken.model.forward
    broken.model.forward = lambda *a, past_key_values=None, **k: forward(*a, past_key_values=None, **k)
    assert qat.convert(broken, probe=IDS).probe["cached"] == "a cached step gives other logits than the full forward"


def gemma3() -> nn.Module:
    text = {**SIZES, "vocab_size": 97, "head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=96,
    )
    return Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("probe", [None, {"input_ids": IDS}], ids=["unprobed", "text"])
def test_a_vision_tower_stays_where_only_text_comes(probe: object) -> None:
    model, pixels = gemma3(), torch.randn(1, 3, 32, 32)
    before = model.model.vision_tower(pixel_values=pixels).last_hidden_state
    record = qat.convert(model, probe=probe)
    assert len(record.converted) == 14 and not any("vision" in name for name in record.converted)
    reason = record.skipped["model.vision_tower.encoder.layers.0.self_attn.q_proj"]
    assert reason == NOT_CALLED if probe else "tower of another modality (model.vision_tower: pixel_values)" in reason
    assert torch.equal(model.model.vision_tower(pixel_values=pixels).last_hidden_state, before)


def test_a_vision_tower_that_the_data_reach_is_converted() -> None:
    ids = IDS.clone()
    ids[0, 2:6] = 96
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32), "token_type_ids": (ids == 96).long()}
    record = qat.convert(gemma3(), probe=batch)
    assert len([name for name in record.converted if "vision" in name]) == 6


def test_a_frozen_model_is_probed_like_another() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).requires_grad_(False)
    record = qat.convert(model, probe=IDS)
    assert len(record.converted) == 14 and not any(parameter.requires_grad for parameter in model.parameters())
