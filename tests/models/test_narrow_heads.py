"""While a model trains, `sdpa` is the kernels for narrow heads; before and after it is transformers' own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qat.models import attention
from qat.ops import cpu

if not cpu.compiled() or not torch.ops.qat.cpu_attention_serves():
    pytest.skip("this CPU has no kernels for attention", allow_module_level=True)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of queries that the kernels are given."""
    found = []

    def noted(query, *rest):
        found.append(tuple(query.shape))
        return real(query, *rest)

    real = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", noted)
    return found


def test_a_model_in_the_context_calls_them(tiny_model: Path, calls):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attention_dropout=0.0)
    ids = torch.arange(32)[None] % 30
    outside = model(input_ids=ids).logits
    with attention.narrow_heads():
        inside = model(input_ids=ids).logits
    assert calls == [(1, 4, 32, 8)] * 2
    torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(input_ids=ids).logits, outside)


def test_it_ends_with_an_error():
    with pytest.raises(KeyError), attention.narrow_heads():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention.attention
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


@pytest.mark.parametrize(
    "more",
    [
        {"attention_mask": torch.ones(1, 1, 32, 32, dtype=torch.bool).tril(3)},
        {"dropout": 0.5},
        {"is_causal": False},
        {"position_bias": torch.randn(1, 2, 32, 32)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_they_do_not_know_is_left_to_torch(more, calls):
    q, k, v = (torch.randn(1, 2, 32, 8) for _ in range(3))
    arguments = {"attention_mask": None, **more}
    module = SimpleNamespace(is_causal=True)
    torch.manual_seed(0)
    found, _ = attention.attention(module, q, k, v, **arguments)
    torch.manual_seed(0)
    assert torch.equal(found, sdpa_attention_forward(module, q, k, v, **arguments)[0])
    assert not calls
