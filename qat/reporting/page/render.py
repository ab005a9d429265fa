"""The page as one file: the template filled in, plotly's code and the figures' data compressed inside it.

plotly.js is what the installed plotly brings, all of it: gzipped and in base64 it is 2.0 MB instead of 4.8, and the browser
unpacks it (DecompressionStream, in all browsers since 2023). The bundle of cartesian charts alone would be 0.7 MB, but no package
of Python's has it: it would have to be copied into this project or fetched from the network by each user.
A content security policy forbids the page any request, whatever is in it.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from qat.reporting.page.parts import Figure, Section
from qat.reporting.page.reading import Run, read_run
from qat.reporting.page.sections import sections
from qat.reporting.page.verdict import Number, Verdict, numbers, verdict
from qat.storage import write_text

FILE = "report.html"
EVALUATES = ("parcoords",)
"""Traces for which plotly makes code as it runs (for WebGL), which the policy then allows."""


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run, whole or not at all, to `out` or <run>/report.html; its path.

    Raises:
        ValueError: the folder holds no run.
    """
    file = out or folder / FILE
    write_text(file, report(read_run(folder)))
    return file


def report(run: Run, live: int | None = None, *, bundle: bool = True) -> str:
    """The page of a run.

    Args:
        live: seconds after which an open page asks its server for what is new; None for a page that asks for nothing.
        bundle: with plotly's code.
    """
    facts = [run.get("model.path"), run.get("quant.weight"), run.result.status.partition(";")[0]]
    return page(run.name, facts, verdict(run), numbers(run), sections(run), live, bundle)


def page(
    title: str,
    facts: Sequence[Any],
    said: Verdict,
    head: Sequence[Number],
    parts: Sequence[Section],
    live: int | None = None,
    bundle: bool = True,
) -> str:
    """The HTML of a head and sections."""
    figures = [block for section in parts for block in section.blocks if isinstance(block, Figure)]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            facts=[str(fact) for fact in facts if fact],
            verdict=said,
            numbers=head,
            sections=parts,
            figures=_packed(json.dumps([_plain(asdict(one)) for one in figures], separators=(",", ":")).encode())
            if figures
            else "",
            plotly=_plotly() if figures and bundle else "",
            live=live,
            evaluates=any(trace["type"] in EVALUATES for one in figures for trace in one.data),
            style=_text("page.css"),
            script=_text("page.js"),
        )
    )


def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("qat.reporting.page", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["breakable"] = breakable
    return found


def breakable(text: object) -> Markup:
    """A text whose keys and paths may go on in the next line behind a dot, a slash or a low line between letters."""
    return Markup(re.sub(r"(?<=[A-Za-z])([._/])(?=[A-Za-z])", r"\1<wbr>", str(escape(str(text)))))


def _text(name: str) -> str:
    return files("qat.reporting.page").joinpath(name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _plotly() -> str:
    return _packed(files("plotly").joinpath("package_data", "plotly.min.js").read_bytes())


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


def _plain(node: Any) -> Any:
    """What JSON holds: NaN and infinite numbers are null, which plotly draws as a gap; six digits are enough for a chart."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    if isinstance(node, float):
        return float(f"{node:.6g}") if math.isfinite(node) else None
    return node
