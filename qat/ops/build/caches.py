"""What torch.compile keeps on the disk between processes, and when it is stale.

torch knows an op by its name and arguments. What the op returns (the shape of what is kept for the backward pass, say) may change
with a version of this package, and code that was compiled before would then refuse its own inputs.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

_SOURCES = Path(__file__).parents[2]


def tag(folders: tuple[str, ...] = ("ops", "quantizers")) -> str:
    """A word for these versions of the ops: of the sources that say what they return."""
    files = sorted(file for folder in folders for file in (_SOURCES / folder).rglob("*.py"))
    return "qat-" + hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def keep_apart() -> None:
    """Let what was compiled with other versions of the ops be compiled anew; a tag of the user's stays."""
    known = torch.compiler.config.cache_key_tag
    if tag() not in known:
        torch.compiler.config.cache_key_tag = f"{known}{tag()}"
