"""The table of losses: values by their definitions, sums and counts, and what a row of one's own takes."""

from __future__ import annotations

import pytest
import torch

from qat.config import DistillConfig
from qat.losses import LOSSES, needs
from qat.losses.logits import divergence, predicted, predicting
from qat.losses.record import Seen


def seen(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None = None) -> Seen:
    teacher_rows = None if teacher is None else predicted(teacher, labels)[0]
    pairs = [] if teacher is None else [(logits, teacher), (2 * logits, teacher)]  # as if they had come of two layers
    return Seen(*predicted(logits, labels), predicting(labels), teacher_rows, None, None, pairs, pairs)


def mean(name: str, *given: torch.Tensor, **distill: float) -> float:
    total, count = LOSSES[name].function(seen(*given), DistillConfig(relation_heads=1, **distill))
    return total.item() / max(count, 1)


def test_predicted_shifts_and_leaves_out_ignored_labels() -> None:
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[1, 2, 3, 4], [0, -100, 2, -100]])
    rows, targets = predicted(logits, labels)
    assert targets.tolist() == [2, 3, 4, 2]
    torch.testing.assert_close(rows, torch.cat([logits[0, :3], logits[1, 1:2]]))
    torch.testing.assert_close(logits[:, :-1][predicting(labels)], rows)


def test_cross_entropy_equals_transformers_loss() -> None:
    logits, labels = torch.randn(2, 6, 7), torch.randint(0, 7, (2, 6))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    assert mean("ce", logits, labels) == pytest.approx(expected.item())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_against_its_definition(temperature: float) -> None:
    student, teacher = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    expected = temperature**2 * (p * (p / q).log()).sum()
    torch.testing.assert_close(divergence(student, teacher, temperature), expected)
    assert divergence(teacher, teacher, temperature).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_sums_and_counts_of_parts_add_up(name: str) -> None:
    logits, teacher, labels = torch.randn(3, 6, 7), torch.randn(3, 6, 7), torch.randint(0, 7, (3, 6))
    labels[0, 2:] = -100
    distill = DistillConfig(temperature=2.0, relation_heads=1)
    total, count = LOSSES[name].function(seen(logits, labels, teacher), distill)
    parts = [LOSSES[name].function(seen(logits[i : i + 1], labels[i : i + 1], teacher[i : i + 1]), distill) for i in range(3)]
    assert count == sum(n for _, n in parts) == 11
    assert total.item() == pytest.approx(sum(t.item() for t, _ in parts), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_no_predicted_token_gives_zero_not_nan(name: str) -> None:
    assert mean(name, torch.randn(1, 4, 5), torch.full((1, 4), -100), torch.randn(1, 4, 5)) == 0.0


def test_rows_say_what_they_need() -> None:
    assert needs(DistillConfig(ce=1.0, kl=0.0), "teacher") == [] and needs(DistillConfig(ce=0.0, kl=1.0), "teacher") == ["kl"]
