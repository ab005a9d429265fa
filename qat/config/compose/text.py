"""Settings as a person types them: text arrives as it is, whatever Hydra's grammar makes of it.

Hydra reads 12345e7 as a number, `on` as a word and `my dir/[x]=1` not at all. The type of a key is known, so the value of a key
that holds text is quoted before Hydra sees it. What keeps Hydra's meaning there: a quoted text, null, its functions such as
choice(a,b), its escapes such as `\\ ` where they parse, and under -m the comma between values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import UnionType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from qat.config.compose.keys import options
from qat.config.describe import keys
from qat.config.run import TrainConfig

KINDS = {key.name: key.type for key in keys(TrainConfig)}
"""Key -> its Python type."""

_SETTING = re.compile(r"(\+{0,2})([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_CALL = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag|extend_list|int|float|str|bool|json_str)\s*\(.*\)", re.DOTALL)
_ESCAPE = re.compile(r"\\[\\()\[\]{}:=, \t]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_DIGITS = re.compile(r"\d[\d_]{300,}")
_NO_NAME = re.compile(r"(?i:null|true|false|[-+\d.e_]*)")
_OPEN, _CLOSE = "([{", ")]}"


def as_typed(setting: str, sweep: bool = False) -> str:
    """The setting in Hydra's grammar, its text quoted; `sweep`: commas part values (-m).

    Raises:
        ValueError: one value where the key holds a list or a mapping, or a number where it holds true or false.
    """
    _check_group(setting)
    match = _SETTING.fullmatch(setting)
    above = match[2].rpartition(".")[0] if match else ""
    named = KINDS.get(above) == dict[str, str]
    kind = str if named else KINDS.get(match[2]) if match else None
    if match is None or kind is None or _CALL.fullmatch(match[3]):
        return setting
    pieces = split(match[3]) if sweep else [match[3]]
    if kind not in (str, str | None) and _DIGITS.search(match[3]):
        raise ValueError(f"{match[2]}={match[3][:20]}... is not allowed; no number has so many digits")
    value = ",".join(_value(match[2], kind, piece) for piece in pieces)
    added = "++" if named or kind == dict[str, str] else match[1]  # a name is new or known, both are meant
    return f"{added}{match[2]}={value}"


def _check_group(setting: str) -> None:
    key, _, value = setting.lstrip("+~").partition("=")
    names = options().get(key)
    if names and (setting.startswith("~") or _NO_NAME.fullmatch(value.strip())):
        raise ValueError(f"{setting} is not allowed; choose one of {', '.join(f'{key}={name}' for name in names)}")


def _value(key: str, kind: Any, value: str) -> str:
    if value.strip().lower() == "null":
        if not isinstance(kind, UnionType):
            word = f"; for the word: {key}=\"'{value}'\"" if kind is str else ""
            raise ValueError(f"{key}={value} is not allowed; a value is needed{word}")
        return value
    if kind in (str, str | None):
        return _text(key, value)
    if kind in (list[str], dict[str, str]):
        return _collection(key, kind, value)
    if kind is bool and re.fullmatch(r"[-+]?[\d_.]+", value) and value not in ("0", "1"):
        raise ValueError(f"{key}={value} is not allowed; choose one of true, false")
    return value


def _text(key: str, value: str) -> str:
    if _SURROGATE.search(value):
        raise ValueError(f"{key}={value!r} is not allowed; a text must be UTF-8, so rename what has other bytes in its name")
    if not value or _QUOTED.fullmatch(value) or (_ESCAPE.search(value) and _parses(value)):
        return value
    return QuotedString(value, Quote.single).with_quotes()


def _parses(value: str) -> bool:
    try:
        return not OverridesParser.create().parse_override(f"key={value}").is_sweep_override()
    except HydraException:
        return False


def _collection(key: str, kind: Any, value: str) -> str:
    left, right, form = ("[", "]", "[{}]") if kind == list[str] else ("{", "}", "{{name: {}}}")
    inner = value.strip()
    if "${" in inner:
        return value
    if not (inner.startswith(left) and inner.endswith(right)):
        what = "a list" if kind == list[str] else "a mapping"
        raise ValueError(f"{key}={value} is not allowed; it must be {what}: {key}={form.format(value)}")
    pieces = [piece.strip() for piece in split(inner[1:-1])] if inner[1:-1].strip() else []
    return left + ",".join(_text(key, piece) if kind == list[str] else _pair(key, piece) for piece in pieces) + right


def _pair(key: str, piece: str) -> str:
    name, colon, value = piece.partition(":")
    return f"{name}{colon}{_text(key, value.strip())}" if colon else piece


def split(value: str) -> list[str]:
    """Parts between commas that lie neither in quotes nor in brackets; brackets that do not pair up are letters."""
    parts = list(_split(value, brackets=True))
    return parts if _balanced(value) else list(_split(value, brackets=False))


def _balanced(value: str) -> bool:
    depth = 0
    for letter in _QUOTED.sub("", value):
        depth += (letter in _OPEN) - (letter in _CLOSE)
        if depth < 0:
            return False
    return depth == 0


def _split(value: str, brackets: bool) -> Iterator[str]:
    start = depth = at = 0
    while at < len(value):
        quoted = _QUOTED.match(value, at)
        letter = value[at]
        depth += brackets * ((letter in _OPEN) - (letter in _CLOSE))
        if letter == "," and depth == 0:
            yield value[start:at]
            start = at + 1
        at = quoted.end() if quoted else at + 1
    yield value[start:]
