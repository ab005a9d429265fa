"""The tests' mirrors of C structs are checked when the emulated kernels load: a wrong one fails there, not as a wrong number."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import Structure, c_int
from typing import Any

import pytest
from mirrors import MIRRORS, PackedLinear, check, layout

Fields = list[tuple[str, Any]]


def swapped(fields: Fields) -> Fields:
    """k and n change places: the same sizes and offsets, under other names."""
    return [*fields[:5], fields[6], fields[5], *fields[7:]]


def without_last(fields: Fields) -> Fields:
    return fields[:-1]


def narrow(fields: Fields) -> Fields:
    return [(name, c_int if name == "groups" else kind) for name, kind in fields]


def test_the_mirrors_are_the_kernels(emulated_kernels: ctypes.CDLL) -> None:
    check(emulated_kernels, MIRRORS)
    assert layout(PackedLinear).startswith("PackedLinear 136 x:0:8 per_tensor:8:1 eps:12:4 ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, r"k:32:8 is n:32:8 in C\+\+, n:40:8 is k:40:8"),
        (without_last, r"nothing is overlap:128:1 in C"),
        (narrow, "groups:48:4 is groups:48:8"),
    ],
)
def test_a_wrong_mirror_fails_loudly(emulated_kernels: ctypes.CDLL, change: Callable[[Fields], Fields], message: str) -> None:
    wrong = type("PackedLinear", (Structure,), {"_fields_": change(list(PackedLinear._fields_))})
    others = [mirror for mirror in MIRRORS if mirror is not PackedLinear]
    with pytest.raises(AssertionError, match=f"the mirror of PackedLinear is wrong: .*{message}"):
        check(emulated_kernels, [*others, wrong])
    with pytest.raises(AssertionError, match="structs without a mirror"):
        check(emulated_kernels, others)
