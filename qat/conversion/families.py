"""Families of layers: those that do the same in every block, by the names that the architecture gives them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping


def families(names: Iterable[str]) -> dict[str, str]:
    """Name of a layer -> its family: q, k, v, o, gate, up, down, or as many last parts of the name as tell the families apart.

    Numbers are places in lists and tell nothing: `layers.3.self_attn.q_proj` is `q`, but where attention and MLP both have a
    `dense`, they are `attention.dense` and `mlp.dense`.
    """
    kinds = {name: tuple(part for part in name.split(".") if not part.isdigit()) for name in names}
    ends = Counter(kind[-n:] for kind in set(kinds.values()) for n in range(1, len(kind) + 1))
    return {name: _short(_own_end(kind, ends)) for name, kind in kinds.items()}


def _own_end(kind: tuple[str, ...], ends: Mapping[tuple[str, ...], int]) -> str:
    """The shortest end of a name that no other kind has; the whole where another ends in it."""
    alone = (n for n in range(1, len(kind) + 1) if ends[kind[-n:]] == 1)
    return ".".join(kind[-next(alone, len(kind)) :])


def _short(label: str) -> str:
    return (label if "." in label else label.removesuffix("_proj")) or label or "layers"
