"""Attention relation: its value and gradient by the definition, and how its projections are found."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import SIZES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qat import QuantConfig, convert
from qat.config import DistillConfig
from qat.losses.logits import predicting
from qat.losses.projections import find_projections
from qat.losses.record import Seen
from qat.losses.relation import relation, settled
from qat.losses.taps import TAPS

GPT2 = {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}


def model(kind: str = "llama", **sizes: Any) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **sizes}))


def naive(mine: list[Tensor], theirs: list[Tensor], heads: int, labels: Tensor, length: list[int]) -> Tensor:
    """Loops over the definition: projection, sequence, head, token."""
    total = torch.zeros(())
    for a, b in zip(mine, theirs, strict=True):
        for i, end in enumerate(length):
            for h in range(heads):
                q, p = (_relation(x[i, :end], heads, h) for x in (a, b))
                for t in range(end - 1):
                    if labels[i, t + 1] != -100:
                        total = total + (p[t] * (p[t] / q[t]).log()).sum() / heads
    return total


def _relation(x: Tensor, heads: int, h: int) -> Tensor:
    width = x.shape[-1] // heads
    part = x[:, h * width : (h + 1) * width]
    return torch.softmax(part @ part.T / math.sqrt(width), -1)


def test_value_and_gradient_against_the_definition() -> None:
    """Queries are wider than keys and values, the teacher is wider than the student, and one sequence has padding."""
    labels = torch.tensor([[1, 2, 3, 4, 5], [1, -100, 3, -100, -100]])
    attended = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    mine = [torch.randn(2, 5, n, requires_grad=True) for n in (8, 4, 4)]
    theirs = [torch.randn(2, 5, n) for n in (16, 8, 8)]
    again = [x.detach().clone().requires_grad_() for x in mine]
    predicts = predicting(labels)
    pairs = list(zip(mine, theirs, strict=True))
    seen = Seen(torch.zeros(5, 7), labels[:, 1:][predicts], predicts, None, None, None, (), pairs, attended)
    total, count = relation(seen, DistillConfig(relation_heads=2))
    expected = naive(again, theirs, 2, labels, [5, 3])
    assert count == 5 and total.item() == pytest.approx(expected.item(), rel=1e-5)
    total.backward()
    expected.backward()
    for a, b in zip(mine, again, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
        assert bool(a.grad.any())  # type: ignore[union-attr]


def test_sequences_of_padding_alone_have_a_gradient_of_zero() -> None:
    mine = torch.randn(1, 3, 4, requires_grad=True)
    predicts = torch.zeros(1, 2, dtype=torch.bool)
    seen = Seen(
        torch.zeros(0, 7), torch.zeros(0), predicts, None, None, None, (), [(mine, mine.detach())], predicts[:, :1].expand(1, 3)
    )
    total, _ = relation(seen, DistillConfig(relation_heads=2))
    total.backward()
    assert total.item() == 0.0 and mine.grad is not None and not bool(mine.grad.any())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral", "opt"])
def test_projections_are_found_by_what_they_take(kind: str) -> None:
    made = model(kind, **{"ffn_dim": 44, "word_embed_proj_dim": 32} if kind == "opt" else {})
    for name, number in (("1", -1), ("0", 0)):
        found = find_projections(made, number)
        named = dict(made.named_modules())
        assert {key for key, value in named.items() if value in found} == {
            key for key in named if f"layers.{name}.self_attn." in key and key[-6:] in ("q_proj", "k_proj", "v_proj")
        }


def test_converted_projections_are_found() -> None:
    made = model()
    convert(made, QuantConfig())
    assert find_projections(made, 1) == [getattr(made.model.layers[1].self_attn, f"{name}_proj") for name in "qkv"]


@pytest.mark.parametrize(
    ("made", "layer", "words"),
    [
        (lambda: model("gpt2", **GPT2), -1, r"no three projections of one input can be told in layer -1 of GPT2LMHeadModel"),
        (model, 2, r"distill.relation_layer=2 is not allowed; LlamaForCausalLM has layers 0 to 1"),
    ],
)
def test_what_has_no_projections_is_refused(made: Any, layer: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_projections(made(), layer)


def test_heads_are_the_model_s_and_must_divide() -> None:
    student, teacher = model(), model(hidden_size=64, num_hidden_layers=3)
    distill = settled(DistillConfig(relation=1.0), student)
    assert distill.relation_heads == 4 and settled(DistillConfig(), student).relation_heads is None
    TAPS["projections"].check(student, teacher, distill, "distill.relation=1.0")
    odd = DistillConfig(relation=1.0, relation_heads=32)
    with pytest.raises(ValueError, match=r"relation_heads=32 does not divide the widths of the student's .* 32, 16, 16; distill"):
        TAPS["projections"].check(student, teacher, odd, "distill.relation=1.0")
