"""Weights as ternary digits: the nearest multiples, and heads that stay near."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qat.inference import digits


@pytest.mark.parametrize(("kind", "error"), [("6bit", 0.03), ("8bit", 0.012)])
def test_heads_in_fewer_bits_stay_near(kind, error):
    torch.manual_seed(0)
    linear = nn.Linear(96, 64).requires_grad_(False)
    x = torch.randn(2, 5, 96)
    head = digits.DigitLinear(linear, digits.HEAD_DIGITS[kind])
    difference = (head(x) - linear(x)).norm() / linear(x).norm()
    assert head(x).shape == (2, 5, 64) and 0 < difference < error


def test_ternary_digits_are_the_nearest_multiples():
    weight = torch.tensor([[40.0, -40.0, 0.0, 13.4, -13.6], [0.5, -1.0, 0.25, 0.0, 1.0]])
    codes, scale = digits.ternary_digits(weight, 4)
    value = (codes.reshape(2, 4, 5) * scale[:, :, None]).sum(1)
    assert value[0].tolist() == [40, -40, 0, 13, -14] and codes.unique().tolist() == [-1, 0, 1]
    torch.testing.assert_close(value[1], (weight[1] * 40).round() / 40)
    assert digits.ternary_digits(torch.zeros(2, 3), 5)[0].eq(0).all()
