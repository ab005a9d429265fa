"""JSON as it comes from disk: whatever is wrong with it is a ValueError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, whose RecursionError at a hundred thousand brackets no caller expects.

    Raises:
        ValueError: the text is no JSON, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


def json_lines(text: str) -> Iterator[dict[str, Any]]:
    """The objects of a file that grows by lines; a line that is none, as one that a kill tore, is left out."""
    for line in text.split("\n"):
        try:
            found = parse_json(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
