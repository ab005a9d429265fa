"""How many tokens a window of evaluated text has: one rule for every verb that measures."""

from __future__ import annotations

from typing import Any

DEFAULT_CONTEXT = 512


def window_context(model: Any, context: int | None = None) -> int:
    """Tokens a window: what was asked for, by default 512 or the model's largest position where that is less.

    Raises:
        ValueError: more than the model's positions.
    """
    from qat.models.hub import context_length

    most = context_length(model)
    if context is None:
        return min(most or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if most is not None and context > most:
        raise ValueError(f"--context {context} is above the model's {most} positions")
    return context
