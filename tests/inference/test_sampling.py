"""The sampler draws from its distribution, and the same again from the same seed."""

from __future__ import annotations

import math

import pytest
import torch

from qat import generate


def test_nucleus_is_the_smallest_set_that_reaches_p():
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    assert generate.nucleus(probabilities, 0.7)[1].tolist() == [1, 3]
    assert generate.nucleus(probabilities, 0.71)[1].tolist() == [1, 3, 4]
    assert generate.nucleus(probabilities, 1.0)[1].tolist() == [0, 1, 2, 3, 4]
    flat = torch.full((1000,), 1e-3, dtype=torch.float64)
    assert len(generate.nucleus(flat, 0.5)[1]) in (500, 501)  # beyond the 256 that are tried first


def test_sampling_follows_the_distribution_and_the_seed():
    logits = torch.tensor([0.0, math.log(3.0)])
    choose = generate.sampler(generate.Sampling(temperature=1.0, seed=3))
    drawn = [choose(logits) for _ in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(0.75, abs=0.03)
    again = generate.sampler(generate.Sampling(temperature=1.0, seed=3))
    assert [again(logits) for _ in range(50)] == drawn[:50]
    assert generate.sampler(generate.Sampling())(logits) == 1
    with pytest.raises(ValueError, match="not finite"):
        choose(torch.tensor([math.nan, 0.0]))
