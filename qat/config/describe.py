"""Every key of the configuration with its type, default and explanation, for the reference and for editors.

The explanation is the string below a field: dataclasses keep none, so the class is read as source once more.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Key:
    """One key: `name` with dots as a user types it, its Python type, its default and its explanation in one line."""

    name: str
    type: Any
    default: Any
    doc: str


def keys(section: type, prefix: str = "") -> Iterator[Key]:
    """The keys of a configuration class and of the classes in it, in the order of declaration."""
    types, docs = get_type_hints(section), explanations(section)
    for one in fields(section):
        kind = types[one.name]
        if is_dataclass(kind):
            yield from keys(kind, f"{prefix}{one.name}.")  # type: ignore[arg-type]
        else:
            yield Key(prefix + one.name, kind, _default(one), docs.get(one.name, ""))


def sections(config: type) -> dict[str, type]:
    """Name -> class of the sections of a configuration class."""
    types = get_type_hints(config)
    return {one.name: types[one.name] for one in fields(config) if is_dataclass(types[one.name])}


def explanations(section: type) -> dict[str, str]:
    """Field -> the string that stands below it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for node, below in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(node.target)] = inspect.cleandoc(str(below.value.value))
    return found


def _default(one: Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default
