"""Token by token in models of every kind: the tokens of transformers' own generation, whatever its cache is."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from tiny import SIZES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qat.config import SelfgenConfig
from qat.data import selfgen
from qat.inference.decode import Decoder, greedy, why_uncached

LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
KINDS: dict[str, tuple[str, dict[str, object], bool]] = {
    "attention": ("llama", {}, True),
    "sliding attention": ("gemma3_text", {"head_dim": 8, "sliding_window": 4}, True),
    "state space": ("mamba2", {"state_size": 16, "num_heads": 8, "head_dim": 8, "n_groups": 1}, False),
    "first state space": ("mamba", {"state_size": 8}, False),
    "recurrent": ("rwkv", {"attention_hidden_size": 32}, False),
}


def model_of(kind: str) -> nn.Module:
    name, more, _ = KINDS[kind]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **more})).eval().requires_grad_(False)
    model.get_output_embeddings().weight.mul_(30)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_one_pass(kind: str) -> None:
    model, ids = model_of(kind), torch.randint(3, 31, (10,), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(model, 18)
    assert (decoder.why == "") == KINDS[kind][2]
    found, expected = greedy(decoder, ids, 8), ids
    for _ in range(8):
        logits = model(input_ids=expected[None], use_cache=False).logits[0, -1]
        expected = torch.cat([expected, logits.argmax()[None]])
    assert torch.equal(found, expected[10:])


def test_the_reason_is_in_words() -> None:
    assert why_uncached(model_of("state space")) == "Mamba2ForCausalLM gives other logits over a cache than in one pass"
    broken = model_of("attention")
    forward = broken.model.forward

    def strict(input_ids: torch.Tensor, use_cache: bool = False, attention_mask: object = None, **other: object) -> object:
        if other.get("past_key_values") is not None:
            raise TypeError("what is past_key_values?")
        return forward(input_ids=input_ids, use_cache=use_cache)

    broken.model.forward = strict
    assert why_uncached(broken) == "LlamaForCausalLM does not run over a cache: what is past_key_values?"
    assert len(greedy(Decoder(broken, 9), torch.tensor([3, 4, 5]), 4)) == 4


@pytest.mark.parametrize("kind", ["attention", "state space"])
def test_sampled_text_is_the_models_own(kind: str, tiny_model: object, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = model_of(kind), AutoTokenizer.from_pretrained(tiny_model)
    settings = SelfgenConfig(tokens=24, valid_tokens=12, batch_size=2, temperature=1e-3)  # as good as the likeliest
    (block,) = selfgen.sample(model, tokenizer, settings, 2, 12, torch.Generator().manual_seed(0), progress=False)
    for row in torch.from_numpy(np.asarray(block)).reshape(2, 12):
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        assert torch.equal(logits[:-1].argmax(-1), row[1:])
    assert ("every token reads its whole sequence again" in capsys.readouterr().err) == (kind == "state space")
