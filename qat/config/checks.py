"""Checks of values; every message names the key, the value and what is allowed.

Types are checked here once more, though Hydra has: a configuration is also built in Python, and what is read from YAML may hold
numbers that no computer counts with. Bounds are wide; they end where a run would crash or never come to its end.
"""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

LARGEST = 2**31 - 1
"""The largest of every whole number but counts of tokens."""
TOKENS = 2**62
"""The largest count of tokens: whatever a text has, within 64 bits."""
EPSILON = 1e-30
"""The smallest lower bound of a scale: below it 127 / scale overflows float32."""

_WORDS = {int: "a whole number within 62 bits", float: "a finite number", bool: "true or false", str: "a text that is not empty"}


def choose(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value == one and type(value) is type(one) for one in allowed):  # 2.0 and True are equal to 2 and 1
        raise ValueError(f"{key}={value!r} is not allowed; choose one of {', '.join(map(str, allowed))}")


def at_least(
    key: str, value: float | None, least: float, *, most: float = LARGEST, open_end: bool = False, why: str = ""
) -> None:
    if value is None:
        return
    if not (value > least if open_end else value >= least):  # also catches NaN
        raise ValueError(f"{key}={value!r} is not allowed; it must be {'above' if open_end else 'at least'} {least}{why}")
    if value > most:
        raise ValueError(f"{key}={_short(value)} is not allowed; it must be at most {most}{why}")


def fraction(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{key}={value!r} is not allowed; it must be at least 0 and below 1")


def check_types(section: str, config: Any, may_be_empty: tuple[str, ...] = ()) -> None:
    """Each field of a section has the type that is declared: whole numbers are no bools, numbers finite, texts not empty.

    Raises:
        ValueError: one has not.
    """
    for name, kind in _types(config.__class__).items():
        value = getattr(config, name)
        if not _fits(value, kind) and not (value == "" and name in may_be_empty):
            key = f"{section}.{name}" if section else name
            raise ValueError(f"{key}={_short(value)} is not allowed; it must be {_name(kind)}")


@cache
def _types(config: Any) -> dict[str, Any]:
    hints = get_type_hints(config)
    return {one.name: hints[one.name] for one in fields(config)}


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= TOKENS
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    if kind is str:
        return isinstance(value, str) and value != ""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(one, get_args(kind)[0]) for one in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(one, str) and _fits(value[one], get_args(kind)[1]) for one in value)
    return kind is Any or isinstance(value, kind)


def _name(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(_name(one) for one in get_args(kind))
    if kind is NoneType:
        return "null"
    if get_origin(kind) is list:
        return f"a list, each {_name(get_args(kind)[0])}"
    return "names with values" if get_origin(kind) is dict else _WORDS.get(kind, kind.__name__)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
