"""Families of layers: those that do the same in every block, by the names that the architecture gives them."""

from __future__ import annotations

from collections.abc import Iterable


def families(names: Iterable[str]) -> dict[str, str]:
    """Name of a layer -> its family: q, k, v, o, gate, up, down, or as many last parts of the name as tell the families apart.

    Numbers are places in lists and tell nothing: `layers.3.self_attn.q_proj` is `q`, but where attention and MLP both have a
    `dense`, they are `attention.dense` and `mlp.dense`.
    """
    kinds = {name: tuple(part for part in name.split(".") if not part.isdigit()) for name in names}
    labels: dict[tuple[str, ...], str] = {}
    for kind in dict.fromkeys(kinds.values()):
        others = [other for other in set(kinds.values()) if other != kind]
        alone = (n for n in range(1, len(kind) + 1) if not any(other[-n:] == kind[-n:] for other in others))
        labels[kind] = ".".join(kind[-next(alone, len(kind)) :])
    return {name: _short(labels[kind]) for name, kind in kinds.items()}


def _short(label: str) -> str:
    return (label if "." in label else label.removesuffix("_proj")) or label or "layers"
