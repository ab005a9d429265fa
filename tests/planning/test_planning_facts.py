"""A plan's numbers beside those of real models: bytes that autograd saves, of weights, gradients and moments, FLOPs, teachers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

import qat
from qat.config import DistillConfig, OptimConfig
from qat.models.weightless import faked
from qat.planning.choosing import state_bytes
from qat.planning.facts import Facts, facts_of, forward_flops, saved_bytes, units_of
from qat.planning.memory import LOGITS, ONE, Choice, Student, parts
from qat.training.gradients.groups import parameter_groups
from qat.training.module import QATModule

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LENGTH = 32


def student(device: str = "cpu", **more: Any) -> nn.Module:
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, **more))
        qat.convert(model)
    return model.train()


def sample() -> dict[str, Any]:
    tokens = torch.arange(LENGTH)[None]
    return {"input_ids": tokens, "labels": tokens, "use_cache": False}


def facts(model: nn.Module, **more: Any) -> Facts:
    return facts_of(model, units_of(model), sample(), **more)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_without_weights_saves_what_a_real_one_saves(tied: bool, mixed: bool) -> None:
    real = facts(student(tie_word_embeddings=tied), mixed=mixed)
    assert facts(student("meta", tie_word_embeddings=tied), fake=faked, mixed=mixed) == real
    assert real.saved.sequence > real.recomputed.sequence > 0 and real.recomputed.fixed < real.saved.fixed


def test_codes_are_kept_in_two_bits_whatever_the_batch() -> None:
    found = facts(student())
    assert found.latents / 4 <= found.saved.fixed <= found.latents / 4 * 1.2


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A step of a real run's module: the student, its optimizer."""
    model = student()
    module = QATModule(model, DistillConfig(ce=1.0, kl=0.0), OptimConfig(), torch.optim.AdamW, 10)
    optimizer = torch.optim.AdamW(parameter_groups(model, OptimConfig()))
    tokens = torch.arange(LENGTH)[None]
    pairs = module.pairs({"input_ids": tokens, "labels": tokens})
    module.loss({name: total for name, (total, _) in pairs.items()}, LENGTH).backward()
    optimizer.step()
    return model, optimizer


def test_weights_gradients_and_moments_are_those_of_a_step() -> None:
    model, optimizer = trained()
    found = parts(Student(facts(model)), Choice(ONE, 1, 1, batch=2, state=state_bytes(torch.optim.AdamW)))
    held = sum(p.nbytes for p in model.parameters())
    moments = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    assert found["weights"] == held and found["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert found["optimizer"] == sum(value.nbytes for value in moments)
    batch = {name: torch.cat([value] * 2) if isinstance(value, torch.Tensor) else value for name, value in sample().items()}
    assert found["codes for backward"] + found["activations"] == saved_bytes(model, batch)


def test_a_teacher_keeps_its_share_of_logits() -> None:
    """What divergence keeps beside cross-entropy, in copies of the float32 logits."""
    model, teacher = student(), AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    kept = {}
    for kl in (0.0, 0.5):
        given = teacher if kl else None
        module = QATModule(model, DistillConfig(ce=1 - kl, kl=kl), OptimConfig(), torch.optim.AdamW, 10, given)
        tokens = torch.arange(LENGTH)[None]
        run = Runs(module)
        kept[kl] = saved_bytes(run, {"batch": {"input_ids": tokens, "labels": tokens}}, lambda loss: loss)
    assert (kept[0.5] - kept[0.0]) / (4 * LENGTH * SIZES["vocab_size"]) == pytest.approx(LOGITS, abs=0.05)


class Runs(nn.Module):
    """The loss of a module as a module's output."""

    def __init__(self, module: QATModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> torch.Tensor:
        pairs = self.module.pairs(batch)
        return self.module.loss({name: total for name, (total, _) in pairs.items()}, LENGTH)


def momentum(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9)


@pytest.mark.parametrize(("make", "each"), [(torch.optim.AdamW, 8.0), (momentum, 4.0), (torch.optim.SGD, 0.0)])
def test_an_optimizers_state_is_measured(make: Any, each: float) -> None:
    assert state_bytes(make) == each


def test_flops_are_those_that_torch_counts() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, attn_implementation="eager", tie_word_embeddings=False))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(LENGTH)[None])
    causal = 2.0 * LENGTH * SIZES["hidden_size"] * SIZES["num_hidden_layers"]  # eager attention computes the other half, too
    assert LENGTH * (forward_flops(model, LENGTH) + causal) == pytest.approx(counter.get_total_flops(), rel=0.01)
