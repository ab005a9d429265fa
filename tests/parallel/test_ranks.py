"""What ranks tell each other: on two processes, and on one, where nothing changes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from devices.pair import Failed, Pair

from qat.parallel import as_one, before_others, first, gathered, rank, same, shared, size, sums, together
from qat.parallel.group import last_word, leave_word


def _facts() -> tuple[int, int, bool]:
    return rank(), size(), first()


def _collected() -> tuple[Any, ...]:
    mine = rank()
    flags = [together(flag) for flag in (False, mine == 0, mine == 1, True)]
    return gathered({"rank": mine}), shared(lambda: f"of {mine}"), flags


def _summed() -> list[torch.Tensor]:
    small = torch.tensor([2.0**-30, 1.0]) if rank() else torch.tensor([1.0, 1.0])  # in float32 the first sum would be 1
    return sums([small, torch.tensor(3 * rank()), torch.ones(2, 2, dtype=torch.bfloat16)])


def _raises(where: int, how: str) -> list[int]:
    def work() -> int:
        if rank() == where:
            raise FileNotFoundError("no file") if how == "file" else KeyError("bug")
        return rank()

    with as_one():
        work()
    return [rank()]


def _nested(where: int) -> None:
    with as_one(), before_others(), as_one():
        if rank() == where:
            raise ValueError("wrong")


def _in_shared() -> Any:
    def fails() -> None:
        raise ValueError("only rank 0 knows")

    return shared(fails)


def _before(folder: str) -> str:
    cache = Path(folder) / "cache"
    with before_others():
        if cache.exists():
            return "found"
        time.sleep(0.2)
        cache.write_text("made")
        return "made"


def _differ() -> None:
    same("equal", "words")
    same(f"config {rank()}", "configurations")


def _dies(where: int) -> None:
    if rank() == where:
        leave_word("the disk is full")
        os._exit(3)
    try:
        gathered(None)
    except RuntimeError:
        raise ValueError(f"{last_word()}") from None


def test_ranks_know_themselves(pair: Pair):
    assert pair(_facts) == [(0, 2, True), (1, 2, False)]


def test_all_get_what_each_says(pair: Pair):
    for found in pair(_collected):
        assert found == ([{"rank": 0}, {"rank": 1}], "of 0", [False, True, True, True])


def test_sums_are_float64(pair: Pair):
    for found in pair(_summed):
        assert [one.dtype for one in found] == [torch.float64] * 3
        assert [one.tolist() for one in found] == [[1 + 2.0**-30, 2.0], 3.0, [[2.0, 2.0], [2.0, 2.0]]]


@pytest.mark.parametrize("where", [0, 1])
def test_a_rank_that_fails_fails_all(pair: Pair, where: int):
    origin = "" if where == 0 else "rank 1 of 2: "
    found = pair.failures(_raises, where, "file")
    assert found[where] == "FileNotFoundError: no file" and found[1 - where] == f"ValueError: {origin}no file"
    found = pair.failures(_raises, where, "bug")
    assert found[where] == "KeyError: 'bug'" and found[1 - where] == f"RuntimeError: {origin}KeyError: 'bug'"


@pytest.mark.parametrize("where", [0, 1])
def test_a_failure_is_told_once(pair: Pair, where: int):
    assert pair.failures(_nested, where)[where] == "ValueError: wrong"
    assert pair(_facts) == [(0, 2, True), (1, 2, False)]  # nobody is left waiting, nor an envelope under way
    assert pair(_collected)[0][1] == "of 0"


def test_rank_0_fails_for_all(pair: Pair):
    assert pair.failures(_in_shared) == ["ValueError: only rank 0 knows"] * 2


def test_rank_0_makes_what_others_find(pair: Pair, tmp_path: Path):
    assert pair(_before, str(tmp_path)) == ["made", "found"]


def test_what_differs_is_refused_by_all(pair: Pair):
    said = "ValueError: the processes of this run have different configurations: rank 0 config 0, rank 1 config 1"
    assert pair.failures(_differ) == [said] * 2


def test_a_rank_that_dies_leaves_word():
    own = Pair()
    try:
        with pytest.raises(Failed, match="rank 1 ended"):
            own(_dies, 1, seconds=20)
    finally:
        own.close()


def test_on_one_process_nothing_changes():
    assert _facts() == (0, 1, True)
    assert gathered("x") == ["x"] and shared(lambda: 3) == 3 and not together(False) and together(True)
    assert sums([torch.ones(2)])[0].tolist() == [1.0, 1.0]
    with before_others(), as_one():
        same("anything", "things")
    with pytest.raises(FileNotFoundError), as_one():
        raise FileNotFoundError
    leave_word("nobody hears it")
    assert last_word() is None
