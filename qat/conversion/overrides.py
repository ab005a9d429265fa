"""Layers that are quantized in other ways than the rest of their model: `quant.overrides`, and back from layers to it.

A layer's own configuration is always a plain one, without overrides: what is per layer is said once, by whoever knows names.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from qat.config import QuantConfig
from qat.config.quant import LAYER_KEYS
from qat.conversion.selection import matches


def layer_config(config: QuantConfig, name: str) -> QuantConfig:
    """How the layer of that name is quantized: the overrides that fit it, key by key the last one.

    Raises:
        ValueError: their keys together make no configuration.
    """
    keys: dict[str, Any] = {}
    for pattern, values in config.overrides.items():
        keys |= values if matches(name, (pattern,)) else {}
    try:
        return config.plain(keys)
    except ValueError as error:
        raise ValueError(f"quant.overrides for {name}: {error}") from error


def refuse_unmatched(config: QuantConfig, names: Iterable[str]) -> None:
    """ValueError for a pattern that fits none of the converted layers."""
    layers = list(names)
    for pattern in config.overrides:
        if not any(matches(name, (pattern,)) for name in layers):
            raise ValueError(f"quant.overrides: {pattern!r} matches none of the {len(layers)} converted layers")


def gathered(configs: Mapping[str, QuantConfig]) -> QuantConfig:
    """The one configuration that gives each layer its own: the most frequent one, and overrides by name for the others.

    Raises:
        ValueError: two layers differ in a key that is no layer's own.
    """
    first, common = next(iter(configs)), [shared(one) for one in configs.values()]
    for name, one in zip(configs, common, strict=True):
        if one != common[0]:
            raise ValueError(f"{name} and {first} have different configs")
    counts = Counter(repr(one) for one in configs.values())
    most = counts.most_common(1)[0][0]
    base = next(one for one in configs.values() if repr(one) == most)
    own = {
        name: {key: getattr(one, key) for key in LAYER_KEYS if getattr(one, key) != getattr(base, key)}
        for name, one in configs.items()
    }
    return base.plain({"overrides": {glob.escape(name): keys for name, keys in own.items() if keys}})


def in_other_words(config: QuantConfig, configs: Mapping[str, QuantConfig]) -> dict[str, str]:
    """For people: which layers are quantized in other words than the model's; {} where none is."""
    found: dict[str, list[str]] = {}
    for name, own in configs.items():
        if own.words != config.words:
            found.setdefault(own.words, []).append(name)
    return {"other layers": "; ".join(f"{words}: {', '.join(names)}" for words, names in found.items())} if found else {}


def shared(config: QuantConfig) -> dict[str, Any]:
    """The keys in which layers of one model agree."""
    return {key: value for key, value in asdict(config).items() if key not in LAYER_KEYS}
