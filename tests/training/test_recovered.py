"""The share of the log ratio that training won back."""

from __future__ import annotations

import math

import pytest

from qat.reporting.result import Perplexity, recovered


def test_recovered_share() -> None:
    shares = recovered({"full_precision": math.e, "converted": math.e**5, "trained": math.e**2})
    assert shares["recovered_share"] == pytest.approx(0.75) and shares["log_ratio_trained"] == pytest.approx(1.0)


@pytest.mark.parametrize(("trained", "said"), [(math.e**2, "75.0% of the log"), (1.0, "more than the log")])
def test_more_than_all_is_said_in_words(trained: float, said: str) -> None:
    values = {"full_precision": math.e, "converted": math.e**5, "trained": trained}
    (line,) = Perplexity("my text", 100, 16, 16, values).lines()
    assert said in line and f"ln(trained / full precision) = {math.log(trained) - 1:.3f}" in line
