"""What of the data was not used is counted, for each kind."""

from __future__ import annotations

import numpy as np

from qat.data.account import of
from qat.data.chat.masked import Chats
from qat.data.mixture import Mixture
from qat.data.order import Windows


def test_texts_have_an_end_that_fills_no_sequence() -> None:
    assert of(Windows(np.arange(70), 32)) == {"sequences": 2, "tokens": 70, "left_over_tokens": 6}


def test_chats_are_cut_or_dropped() -> None:
    late = np.arange(9), np.arange(9) == 8  # its only word of the assistant lies behind the cut
    long = np.arange(9), np.ones(9, dtype=bool)
    short = np.arange(3), np.ones(3, dtype=bool)
    assert of(Chats([late, long, short], 5, 0)) == {"sequences": 2, "tokens": 8, "cut": 2, "dropped": 1}


def test_a_mixture_is_the_account_of_its_parts() -> None:
    parts = Windows(np.arange(33), 8), Windows(np.arange(16), 8)
    found = of(Mixture(parts, 0.5))
    assert [one["left_over_tokens"] for one in found["parts"]] == [1, 0]
