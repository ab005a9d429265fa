"""Lines for people: broken between words in a terminal, whole in a pipe or a file, where they are searched by line.

Commands, paths alone and errors are printed as they are, so that they can be copied.
"""

from __future__ import annotations

import sys
import textwrap

from rich.console import Console


def say(*lines: str) -> None:
    """Print them to stdout, each wrapped."""
    for line in lines:
        print(wrapped(line), flush=True)


def wrapped(line: str, indent: int = 2) -> str:
    """The line for stdout; what does not fit the terminal goes on in lines that are indented by so many columns."""
    if not sys.stdout.isatty():
        return line
    return textwrap.fill(line, Console().width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
