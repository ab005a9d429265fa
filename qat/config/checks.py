"""Checks of one value; every message names the key, the value and what is allowed."""

from __future__ import annotations

from typing import Any


def choose(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed or isinstance(value, float):  # 2.0 is equal to 2
        raise ValueError(f"{key}={value!r} is not allowed; choose one of {', '.join(map(str, allowed))}")


def at_least(key: str, value: float | None, least: float, *, open_end: bool = False) -> None:
    if value is None:
        return
    if not (value > least if open_end else value >= least):  # also catches NaN
        raise ValueError(f"{key}={value!r} is not allowed; it must be {'above' if open_end else 'at least'} {least}")


def fraction(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{key}={value!r} is not allowed; it must be at least 0 and below 1")
