"""`--help`, and `--help GROUP`: what may be chosen in a group, and its keys with their types, defaults and explanations.

Hydra's own help composes everything first, which takes more than a second.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from qat.config.compose.keys import config_folder, options
from qat.config.describe import Key, keys, sections
from qat.config.run import TrainConfig

HELP = """Fine-tune a pretrained model as a ternary or binary BitLinear model.

  python -m qat.train recipe=NAME [key=value ...]    train, verify, pack, export
  python -m qat.train recipe=NAME --dry-run          coverage, memory and tokens; no training
  python -m qat.train resume=runs/NAME/TIME          continue a run exactly
  python -m qat.train -m recipe=NAME key=a,b         one run for each value
  python -m qat.train recipe=NAME --cfg job          all keys with their values
  python -m qat.train --help optim                   a group's keys, explained
  python -m qat.train -v recipe=NAME                 which kernels serve, and from where

recipes, and the groups that they and you choose from:
"""
_WIDEST = 100
"""Columns, where the terminal has as many."""


def help_text(arguments: Sequence[str] = ()) -> str:
    """What `--help` prints: of all, or of the groups that are named beside it.

    Raises:
        ValueError: there is no such group.
    """
    asked = [one.strip("=") for one in arguments if not one.startswith("-")]
    if not asked:
        return HELP + "\n".join(f"  {group + '=':<11}{', '.join(names)}" for group, names in options().items())
    return "\n\n".join("\n".join(_group(name.partition("=")[0])) for name in asked)


def _group(name: str) -> Iterator[str]:
    found, known = options(), sections(TrainConfig)
    plain = [key for key in keys(TrainConfig) if "." not in key.name]
    if name not in {*found, *known, *(key.name for key in plain)}:
        allowed = ", ".join(dict.fromkeys([*found, *known, *(key.name for key in plain)]))
        raise ValueError(f"--help {name}: there is no such group; choose one of {allowed}")
    if name in found:
        yield f"{name}={'|'.join(found[name])}"
        yield from (line for one in found[name] for line in _option(name, one))
    if name in known:
        yield from ([""] if name in found else [])
        yield from _wrapped(" ".join((known[name].__doc__ or "").split()), "")
    shown = keys(known[name], f"{name}.") if name in known else (key for key in plain if key.name == name)
    for key in shown:
        head = f"{key.name}  {type_words(key.type)}, default {default_words(key)}"
        yield from ["", *_wrapped(head, ""), *_wrapped(key.doc, "    ")]


def _option(group: str, name: str) -> Iterator[str]:
    """An option with the first words of its file."""
    folder = config_folder("recipes") if group == "recipe" else config_folder("conf") / group
    lines = (folder / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    said = [line[2:] for line in lines if line.startswith("# ") and "$schema" not in line]
    yield f"  {name}"
    yield from _wrapped(said[0], "      ") if said else ()


def _wrapped(text: str, indent: str) -> list[str]:
    width = min(shutil.get_terminal_size((80, 24)).columns, _WIDEST)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", NoneType: "null", Any: "anything"}


def type_words(kind: Any) -> str:
    """A key's type: `whole number or null`, `list of texts`."""
    if isinstance(kind, UnionType):
        return " or ".join(type_words(one) for one in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {type_words(get_args(kind)[0])}s"
    return "names with values" if get_origin(kind) is dict else _WORDS[kind]


def default_words(key: Key) -> str:
    """A default as it is typed."""
    if isinstance(key.default, str):
        return key.default or '""'
    return json.dumps(key.default)
