"""What is said of inputs: a peak is counted against the others of its token, so that narrow layers can have one."""

from __future__ import annotations

import pytest
import torch

from qat.monitor.inputs import ALONE, input_sums


@pytest.mark.parametrize("width", [64, 576, 5000])
def test_one_input_that_outweighs_the_others_shows_at_any_width(width: int) -> None:
    x = torch.ones(3, width)
    x[1:, 5] = 100
    total, tokens = input_sums(x, 8)["act_peak"]
    assert tokens == 3 and total == pytest.approx(201, rel=1e-4)
    x[0], x[1] = 0, torch.nn.functional.one_hot(torch.tensor(3), width)
    assert input_sums(x, 8)["act_peak"][0] == pytest.approx(ALONE + 100, rel=1e-4)
