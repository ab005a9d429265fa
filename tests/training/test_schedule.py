"""Schedules and losses by value."""

from __future__ import annotations

import math

import pytest
import torch

from qat.losses import logits as distill
from qat.training.schedule import lambda_at, lr_factor, weight_decay_factor


def test_warmup_rises_to_the_peak() -> None:
    assert [lr_factor(s, 100, "cosine", warmup=4) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "middle", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)])
def test_factor_half_way_and_at_the_end(kind: str, middle: float, end: float) -> None:
    assert lr_factor(50, 100, kind) == pytest.approx(middle)
    assert lr_factor(100, 100, kind) == pytest.approx(end)


def test_final_fraction_is_reached() -> None:
    assert lr_factor(100, 100, "cosine", final=0.1) == pytest.approx(0.1)


def test_two_stage_drops_abruptly_half_way() -> None:
    assert lr_factor(49, 100, "two_stage") == pytest.approx(0.51)
    assert lr_factor(50, 100, "two_stage") == pytest.approx(0.5 * 2 / 3)
    assert [weight_decay_factor(s, 100, "two_stage") for s in (49, 50)] == [1.0, 0.0]
    assert weight_decay_factor(50, 100, "cosine") == 1.0


def test_lambda_rises_to_one() -> None:
    assert [lambda_at(s, 4) for s in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert lambda_at(0, 0) == 1.0


def test_predicted_shifts_and_leaves_out_ignored_labels() -> None:
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[1, 2, 3, 4], [0, -100, 2, -100]])
    rows, targets = distill.predicted(logits, labels)
    assert targets.tolist() == [2, 3, 4, 2]
    torch.testing.assert_close(rows, torch.cat([logits[0, :3], logits[1, 1:2]]))


def test_cross_entropy_equals_transformers_loss() -> None:
    logits, labels = torch.randn(2, 6, 7), torch.randint(0, 7, (2, 6))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(distill.cross_entropy(*distill.predicted(logits, labels)), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_against_its_definition(temperature: float) -> None:
    student, teacher = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distill.logits_kl(student, teacher, temperature), expected)
    assert distill.logits_kl(teacher, teacher, temperature).item() == pytest.approx(0.0, abs=1e-12)


def test_no_predicted_token_gives_zero_not_nan() -> None:
    rows, targets = distill.predicted(torch.randn(1, 4, 5), torch.full((1, 4), -100))
    assert distill.cross_entropy(rows, targets).item() == 0.0
    assert math.isfinite(distill.logits_kl(rows, rows, 1.0).item())
