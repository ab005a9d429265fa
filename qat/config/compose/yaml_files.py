"""YAML that may come from others: read within bounds of size, depth and what its aliases expand to.

A few aliases of aliases make a file of a kilobyte a gigabyte of nodes ("billion laughs"), and deep nesting ends Python's stack.
Both are counted over the parser's events, which build nothing. Rejected: refusing aliases, which are useful in a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.config.compose.errors import first_lines

MOST_BYTES = 262_144
MOST_DEPTH = 32
MOST_NODES = 20_000


def read_yaml(file: Path) -> DictConfig:
    """The mapping that a file holds; empty for an empty file.

    Raises:
        ValueError: no YAML, no mapping, or beyond the bounds; the message names the file.
        OSError: the file cannot be read.
    """
    try:
        text = _text(file)
        _check_bounds(text)
        content = OmegaConf.load(StringIO(text)) if text.strip() else OmegaConf.create({})
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, RecursionError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{file} is damaged: {first_lines(error)}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{file} is damaged: it must hold keys with values, not a list")
    return content


def plain_values(file: Path) -> dict[str, Any]:
    """The same as plain data that is looked at and never run: interpolations stay as they are written.

    Raises:
        ValueError, OSError: as `read_yaml`.
    """
    found: dict[str, Any] = OmegaConf.to_container(read_yaml(file))  # type: ignore[assignment]
    return found


def _text(file: Path) -> str:
    with file.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    return data.decode()


@dataclass
class _Count:
    """Nodes and depth below an open collection, aliases expanded."""

    anchor: str | None = None
    nodes: int = 1
    depth: int = 1


@dataclass
class _Bounds:
    open: list[_Count] = field(default_factory=lambda: [_Count()])
    anchors: dict[str, _Count] = field(default_factory=dict)

    def add(self, nodes: int, depth: int) -> None:
        top = self.open[-1]
        top.nodes += nodes
        top.depth = max(top.depth, depth + 1)
        if len(self.open) + top.depth - 1 > MOST_DEPTH:
            raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels")
        if sum(count.nodes for count in self.open) > MOST_NODES:
            raise ValueError(f"it has more than {MOST_NODES} values, aliases counted as what they stand for")

    def close(self) -> None:
        done = self.open.pop()
        if done.anchor:
            self.anchors[done.anchor] = done
        self.add(done.nodes, done.depth)


def _check_bounds(text: str) -> None:
    bounds = _Bounds()
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            bounds.open.append(_Count(event.anchor))
            bounds.add(0, 0)
        elif isinstance(event, yaml.CollectionEndEvent):
            bounds.close()
        elif isinstance(event, yaml.AliasEvent):
            _alias(bounds, event)
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor:
                bounds.anchors[event.anchor] = _Count()
            bounds.add(1, 1)


def _alias(bounds: _Bounds, event: Any) -> None:
    found = bounds.anchors.get(event.anchor)
    if found is None:  # not there, or within itself
        raise ValueError(f"line {event.start_mark.line + 1}: the alias *{event.anchor} stands for nothing that is complete")
    bounds.add(found.nodes, found.depth)
