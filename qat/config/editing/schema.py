"""`python -m qat.config.editing.schema > conf/schema.json`: recipes as a JSON schema, for editors.

Types, defaults and explanations are the dataclasses'. What a key allows stands in their checks alone, so those are asked: each
key is given a value that nothing can be, and the message names what is allowed. Hydra's `defaults` list and interpolations
(`${...}`) are let through.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from qat.config.describe import explanations
from qat.config.run import TrainConfig

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
_INTERPOLATION = {"type": "string", "pattern": r"\$\{"}
_WRONG: dict[str, Any] = {"string": "\0", "integer": -(10**9), "number": -1e9}


def schema() -> dict[str, Any]:
    """The schema of a recipe: any of TrainConfig's keys, and Hydra's `defaults`."""
    defaults = {"type": "array", "description": "Groups that this recipe takes: `override /GROUP: NAME` (see conf/)."}
    recipe = _section(TrainConfig)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of qat",
        **recipe,
        "properties": {"defaults": defaults, **recipe["properties"]},
        "$defs": {"interpolation": _INTERPOLATION},
    }


def allowed_values(section: type, name: str) -> list[Any]:
    """What a section's key may be, or [] where that is no list: every value of a boolean, those that a check names."""
    kinds = _kinds(get_type_hints(section)[name])
    if kinds[:1] == ["boolean"]:
        return [True, False]
    listed = re.search(r"choose one of (.*)$", _complaint(section, name, kinds))
    return [_read(word) for word in listed[1].split(", ")] if listed else []


def _section(section: type) -> dict[str, Any]:
    docs, types = explanations(section), get_type_hints(section)
    properties = {}
    for one in fields(section):
        if is_dataclass(types[one.name]):
            properties[one.name] = _section(types[one.name])
        else:
            properties[one.name] = {"description": docs.get(one.name, ""), **_key(section, one.name, types[one.name])}
    about = (section.__doc__ or "").partition("\n")[0]
    return {"type": "object", "description": about, "properties": properties, "additionalProperties": False}


def _key(section: type, name: str, kind: Any) -> dict[str, Any]:
    """The type of a key, what its check says, and its default."""
    if get_origin(kind) in (list, dict):
        return _container(section, name, kind)
    kinds = _kinds(kind)
    values = allowed_values(section, name) if "boolean" not in kinds else []
    own: dict[str, Any] = {"enum": values} if values else {"type": kinds if len(kinds) > 1 else kinds[0]}
    own |= {} if values else _limit(_complaint(section, name, kinds))
    default = getattr(section(), name)
    free = "string" in own.get("type", "")
    return {**(own if free else {"anyOf": [own, {"$ref": "#/$defs/interpolation"}]}), "default": default}


def _container(section: type, name: str, kind: Any) -> dict[str, Any]:
    if get_origin(kind) is dict:
        return {"type": "object", "default": getattr(section(), name)}
    (kinds,) = (_kinds(one) for one in get_args(kind))
    listed = re.search(r"choose one of (.*)$", _complaint(section, name, kinds, lambda wrong: [wrong]))
    items = {"enum": listed[1].split(", ")} if listed else {"type": kinds[0]}
    return {"type": "array", "items": items, "default": getattr(section(), name)}


def _kinds(kind: Any) -> list[str]:
    """JSON's types of a key, null last."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [_TYPES[part] for part in parts]


def _complaint(section: type, name: str, kinds: list[str], wrap: Callable[[Any], Any] = lambda wrong: wrong) -> str:
    """What the section's check says to a value that no key may have; "" if it does not mind."""
    if kinds[0] not in _WRONG:
        return ""
    try:
        section(**{name: wrap(_WRONG[kinds[0]])})
    except ValueError as error:
        return str(error)
    return ""


def _limit(complaint: str) -> dict[str, float]:
    """`must be at least 1`, `must be above 0`, as JSON schema says it."""
    found = re.search(r"must be (at least|above|in) (-?[\d.]+(?:e-?\d+)?)(?: (?:and below|to) ([\d.]+))?", complaint)
    if not found:
        return {}
    upper = {} if found[3] is None else {"maximum" if found[1] == "in" else "exclusiveMaximum": float(found[3])}
    return {"exclusiveMinimum" if found[1] == "above" else "minimum": float(found[2]), **upper}


def _read(word: str) -> Any:
    return None if word == "None" else int(word) if word.lstrip("-").isdigit() else word


def text() -> str:
    """The schema as it lies in conf/schema.json."""
    return json.dumps(schema(), indent=1) + "\n"


if __name__ == "__main__":
    print(text(), end="")
