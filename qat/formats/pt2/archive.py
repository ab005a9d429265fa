"""What an exported .pt2 file may hold, checked before torch sees it: torch unpickles entries, evaluates strings as expressions,
and looks functions up by their names. Nothing of an exported file is code; a compiled one is machine code.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_ENTRY = re.compile(
    r"(models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
    r"|\.format_version|\.storage_alignment|extra/writer)"
)
_TARGET = re.compile(r"(torch\.ops\.\w+\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+|torch\._sym_\w+)")
_WORD = re.compile(r"[^\W\d]\w*")
_WORDS = frozenset(
    {"Symbol", "Integer", "Add", "Mul", "Pow", "Mod", "Max", "Min", "FloorDiv", "CeilDiv", "CleanDiv", "PythonMod", "Rational"}
    | {"Eq", "Ne", "Le", "Lt", "Ge", "Gt", "And", "Or", "Not", "Equality", "Unequality", "StrictLessThan", "LessThan"}
    | {"GreaterThan", "StrictGreaterThan", "positive", "integer", "nonnegative", "True", "False", "None", "evaluate"}
)


def check_archive(file: Path) -> None:
    """Refuse an exported file with anything beyond what an export writes.

    Raises:
        ValueError: an entry, an expression, a function's name or a pickle that no export of ours holds; it is named.
    """
    with zipfile.ZipFile(file) as archive:
        names = _entries(archive)
        for name in (name for name in names if name.endswith("_config.json")):
            if any(one.get("use_pickle") for one in _dicts(json.loads(archive.read(names[name])))):
                raise ValueError(f"{name} asks for a pickle")
        _check_program(json.loads(archive.read(names["models/model.json"])))
        if "data/sample_inputs/model.pt" in names:  # torch falls back to unpickling everything where this fails
            torch.load(io.BytesIO(archive.read(names["data/sample_inputs/model.pt"])), weights_only=True)


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Entries by their names below the archive's folder."""
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename.partition("/")[2]
        if not _ENTRY.fullmatch(name) or name in found:
            raise ValueError(f"the entry {entry.filename!r} is none that an export writes")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"the entry {entry.filename!r} is compressed, which no export does")
        found[name] = entry
    if "models/model.json" not in found:
        raise ValueError("it holds no program")
    return found


def _check_program(program: Any) -> None:
    if program.get("guards_code"):
        raise ValueError("it holds guards, which are Python code")
    for one in _dicts(program):
        text, target = one.get("expr_str"), one.get("target")
        if text is not None and not _is_expression(text):
            raise ValueError(f"{str(text)[:80]!r} is no expression of sizes")
        if "inputs" in one and isinstance(target, str) and not _TARGET.fullmatch(target):
            raise ValueError(f"it calls {target[:80]!r}, which is no operation")


def _is_expression(text: Any) -> bool:
    """Sums, products and comparisons of sizes, without attributes, subscripts or other names."""
    if not isinstance(text, str) or len(text) > 10_000 or re.search(r"[^\w\s()+\-*/,.=<>&|~']|\.\s*[^\W\d]|__", text):
        return False
    return all(word in _WORDS or re.fullmatch(r"[a-z]{1,3}\d+", word) for word in _WORD.findall(text))


def _dicts(found: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON value; without recursion, which a deep one would exhaust."""
    rest = [found]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            yield one
            rest.extend(one.values())
        elif isinstance(one, list):
            rest.extend(one)
