"""What a run had to learn from and what of it was not used, as numbers: sequences and tokens, cut, dropped and left over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qat.data.chat.masked import Chats
from qat.data.labelled.parts import Labelled
from qat.data.mixture import Mixture
from qat.data.order import Windows

if TYPE_CHECKING:
    from qat.data.datamodule import QATData


def account(data: QATData) -> dict[str, Any]:
    """`training` and `validation`, each with its `text`, `sequences` and what applies to its kind, and `notes` for people."""
    parts = {"training": (data.name, data.train), "validation": (data.eval_name, data.valid)}
    found: dict[str, Any] = {kind: {"text": name, **of(part)} for kind, (name, part) in parts.items()}
    return {**found, "notes": [*data.notes]} if data.notes else found


def of(part: Any) -> dict[str, Any]:
    """Of text `tokens` and the `left_over_tokens` of its end; of chats and labelled texts how many were `cut` or `dropped`."""
    if isinstance(part, Mixture):
        return {"sequences": len(part), "parts": [of(one) for one in part.parts]}
    found: dict[str, Any] = {"sequences": len(part)}
    if isinstance(part, Windows):
        return {**found, "tokens": len(part.tokens), "left_over_tokens": len(part.tokens) % part.length}
    if isinstance(part, Chats):
        tokens = sum(len(ids) for ids, _ in part.items)
        return {**found, "tokens": tokens, "cut": part.truncated, "dropped": part.dropped}
    return {**found, "cut": part.truncated} if isinstance(part, Labelled) else found
