"""The probe looks at training as well as at evaluation, and follows outputs to decays and choices however they are written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import Pair, X, outcome
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, LlamaConfig, LlamaForCausalLM

import qat
from qat.conversion.probe import FROZEN, NOT_IN_TRAINING
from qat.data.opening import probe_batch

F = nn.functional


def test_a_weight_that_is_read_in_training_only_stays() -> None:
    reason = outcome(lambda m, h: F.linear(h, m.second.weight) if m.training else m.second(h))
    assert reason is not None and reason.startswith("its weight is read outside its own forward")


def test_a_layer_that_is_called_in_eval_mode_only_stays() -> None:
    assert outcome(lambda m, h: h if m.training else m.second(h)) == NOT_IN_TRAINING


def test_a_layer_that_is_dropped_at_random_in_training_is_converted() -> None:
    torch.manual_seed(0)
    assert outcome(lambda m, h: h if m.training and torch.rand(()) < 0.5 else h + m.second(h)) is None


def test_a_model_that_does_not_run_in_training_mode_is_judged_by_the_other() -> None:
    class Failing(Pair):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("needs labels")
            return super().forward(x)

    assert qat.convert(Failing(lambda m, h: m.second(h)), probe=X).converted == ["first", "second"]


def test_a_frozen_layer_among_trained_ones_stays_unless_named() -> None:
    def model() -> nn.Module:
        pair = Pair(lambda m, h: m.second(h))
        pair.second.requires_grad_(False)
        return pair

    assert qat.convert(model(), probe=X).skipped == {"second": FROZEN}
    assert qat.convert(model(), probe=X, include=["*", "second"]).skipped == {}


DECAYS: dict[str, Callable[[Pair, Tensor], Tensor]] = {
    "log sigmoid": lambda m, h: h * (F.logsigmoid(m.second(h)) / 16).exp(),
    "a power of two": lambda m, h: h * torch.exp2(-F.softplus(m.second(h))),
    "a running product": lambda m, h: h * m.second(h).sigmoid().cumprod(0),
    "of a tanh": lambda m, h: h * torch.exp(-m.second(h).tanh().square()),
}


@pytest.mark.parametrize("kind", DECAYS)
def test_a_decay_stays_however_it_is_written(kind: str) -> None:
    assert outcome(DECAYS[kind]) == "a selector, kept in full precision: its output is exponentiated: a decay or a scale"


def test_the_likeliest_of_each_row_is_picked_and_a_pool_over_rows_is_not() -> None:
    reason = outcome(lambda m, h: h * m.second(h).softmax(-1).max(-1)[0][:, None], 24)
    assert reason == "a selector, kept in full precision: its output is picked from (max)"
    assert outcome(lambda m, h: m.second(h).max(0)[0], 24) is None


def test_the_first_half_of_a_router_belongs_to_it_behind_an_activation() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(16, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.value(x) * self.b(self.a(x).tanh()).softmax(-1).topk(2)[0].sum(-1, keepdim=True)

    assert qat.convert(Router(), probe=X).converted == ["value"]


def test_branches_by_another_name_have_a_router_beside_them() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chooser, self.branches = nn.Linear(32, 16), nn.ModuleList(nn.Linear(32, 32) for _ in range(16))

    assert qat.convert(Routed()).skipped == {"chooser": "MoE router, kept in full precision (16 outputs for 16 experts)"}


def test_an_adapter_by_another_name_is_told_by_its_shapes() -> None:
    class Lifted(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.base, self.a, self.b = nn.Linear(64, 48), nn.Linear(64, rank), nn.Linear(rank, 48)

    record = qat.convert(nn.ModuleDict({"x": Lifted(12), "y": nn.Linear(64, 64)}))
    assert record.converted == ["y"] and all("part of an adapter" in reason for reason in record.skipped.values())
    assert len(qat.convert(Lifted(24)).converted) == 3
    assert len(qat.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 12), nn.Linear(12, 64))).converted) == 3


def test_towers_stay_in_a_model_of_text_that_names_its_pixels_first() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "opt", "vocab_size": 97, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1}
    config = Blip2Config(
        text_config={**text, "num_attention_heads": 2, "word_embed_proj_dim": 32},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        qformer_config={**sizes, "vocab_size": 97, "encoder_hidden_size": 32},
        num_query_tokens=2,
        image_token_index=96,
    )
    record = qat.convert(Blip2ForConditionalGeneration(config))
    assert {name.partition(".")[0] for name in record.converted} == {"language_model"}
    assert "tower of another modality (qformer" in record.skipped["qformer.encoder.layer.0.attention.attention.query"]


def test_a_run_probes_as_it_trains_without_a_cache() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    batch = probe_batch(None, LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes)))
    assert batch["use_cache"] is False and batch["input_ids"].shape == (1, 32)
