"""Schedules by value."""

from __future__ import annotations

import pytest

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
