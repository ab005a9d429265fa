"""Reads the values of a GGUF file one after another, and believes no length that goes beyond its end."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

_SCALARS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")  # by the number of the value type
_STRING, _ARRAY = 8, 9


@dataclass
class Cursor:
    """Reads on from `at`; each step is checked against the end."""

    data: memoryview
    at: int

    def expect(self, size: int, what: str) -> None:
        left = len(self.data) - self.at
        if size > left:
            raise ValueError(f"{what} needs {size} bytes, but {left} are left")

    def take(self, size: int, what: str) -> bytes:
        self.expect(size, what)
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        text = self.take(self.scalar("Q", what), what)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8") from error

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key)
        return self.scalar(_code(kind, key), key)

    def array(self, key: str) -> list[Any]:
        kind, count = self.scalar("I", key), self.scalar("Q", key)
        if kind == _STRING:
            self.expect(count * 8, key)
            return [self.string(key) for _ in range(count)]
        code = _code(kind, key)
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code), key)))


def _code(kind: int, key: str) -> str:
    code = _SCALARS[kind] if 0 <= kind < len(_SCALARS) else None
    if code is None:
        raise ValueError(f"{key} has the unknown value type {kind}")
    return code
