"""The .pt2 file as a format: `qat.formats.pt2.program` writes it, another process reads it back (`read_back`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from qat.conversion.layers import quantized_layers
from qat.formats.pt2 import program as aoti
from qat.formats.pt2.read_back import read_back as read_back
from qat.formats.pt2.read_back import recorded as recorded
from qat.formats.pt2.read_back import report as report


def unsupported(model: nn.Module, tokenizer: Any = None, *, kind: str = "exported") -> str | None:
    """Why the format cannot hold this model (packed, or with BitLinear layers), as far as is known before it is traced."""
    return None if quantized_layers(model) else f"{type(model).__name__} has no quantized layers"


def save(
    model: nn.Module,
    file: str | Path,
    tokenizer: Any = None,
    *,
    kind: str = "exported",
    card: object = None,
    check: Callable[[Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write a packed causal language model as a function from token ids to logits; `tokenizer` and `card` have no place in it.

    Args:
        file: NAME.pt2; replaced if an earlier export wrote it.
        kind: of `qat.formats.pt2.program.KINDS`.
        check: called with the finished file before it gets its name, such as `read_back`; if it raises, nothing is left.

    Returns:
        {"file", "kind", "bytes", "verification": what `check` returned}.

    Raises:
        ValueError: as `qat.formats.pt2.program.save`.
    """
    if reason := unsupported(model):
        raise ValueError(f"the pt2 format cannot hold this model: {reason}")
    found: dict[str, Any] = {}
    target = aoti.save(model, file, kind=kind, check=None if check is None else lambda new: found.update(check(new)))
    return {"file": str(file), "kind": kind, "bytes": target.stat().st_size, "verification": found}
