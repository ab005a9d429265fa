"""What a packed model says about itself, as JSON: the `quantization_config` of its config.json.

quant_method  "qat"
version       2 (1 was a file of another name, before transformers could load the folder)
layout        of the codes: 2bit, base3 or sparse
quant         the QuantConfig; `kernels` is left out, so that the file never depends on the machine. Its `overrides` are by name
layers        name -> in_features of every packed layer, because its bytes do not tell the unpadded width
skipped       name -> why a layer stays in full precision
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from qat.config import QuantConfig
from qat.conversion.layers import packed_layers
from qat.conversion.overrides import gathered, refuse_unmatched, shared
from qat.conversion.record import Conversion
from qat.nn.bitlinear import BitLinear
from qat.nn.packed import PackedBitLinear
from qat.quantizers.layouts import get_layout

METHOD, VERSION = "qat", 2
_NEWER: dict[str, Any] = {
    "rms_norm_eps": None,
    "components": 1,
    "component_scales": "fitted",
    "scale_multiplier": 1.0,
    "overrides": {},
    "budget_bits": None,
    "act_hadamard": False,
}
_UNSTORED = ("kernels", "rms_norm_start")
"""Keys that say how it ran and how it was trained, not what it is."""
_KEYS = ("quant_method", "version", "layout", "quant", "layers", "skipped", "crc32")


def describe(model: nn.Module, record: Conversion | None = None) -> dict[str, Any]:
    """The manifest of a packed model. Of `record` only the reasons of skipped layers are taken.

    Raises:
        ValueError: no packed layers, layers of several kinds, or layers that stock readers could take for plain ones.
    """
    layers = packed_layers(model)
    quant, layout = _one_kind(model, layers)
    if all(layer.in_features == 1 for layer in layers.values()):
        raise ValueError("every packed layer has in_features=1: the packed weights would look like plain ones to other readers")
    return sealed(
        {
            "quant_method": METHOD,
            "version": VERSION,
            "layout": layout,
            "quant": quant_entry(quant),
            "layers": {name: layer.in_features for name, layer in layers.items()},
            "skipped": dict(record.skipped) if record is not None else {},
        }
    )


def quant_entry(config: QuantConfig) -> dict[str, Any]:
    """The manifest's `quant`. Without the newer keys where they change nothing, so that an older qat reads what it can run."""
    unused = {key for key, value in _NEWER.items() if getattr(config, key) == value}
    return {key: value for key, value in asdict(config).items() if key not in {*_UNSTORED, *unused}}


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its checksum."""
    rest = {key: value for key, value in manifest.items() if key != "crc32"}
    return {**rest, "crc32": f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"}


def _one_kind(model: nn.Module, layers: Mapping[str, PackedBitLinear]) -> tuple[QuantConfig, str]:
    """The configuration that all layers have, but for its overrides, and their layout."""
    if not layers:
        hint = "; call qat.pack first" if any(isinstance(m, BitLinear) for m in model.modules()) else ""
        raise ValueError(f"{type(model).__name__} has no packed layers to save{hint}")
    configs = {name: replace(layer.config, kernels="auto") for name, layer in layers.items()}
    kinds = {(repr(shared(configs[name])), layer.layout) for name, layer in layers.items()}
    if len(kinds) > 1:
        raise ValueError(f"{type(model).__name__} mixes {len(kinds)} kinds of packed layers; one file holds one kind")
    return gathered(configs), next(iter(layers.values())).layout


def parse(manifest: object) -> tuple[Conversion, dict[str, int]]:
    """The conversion record and the widths; ValueError for anything that `describe` does not write."""
    if not isinstance(manifest, Mapping) or manifest.get("quant_method") != METHOD:
        raise ValueError(f"not the manifest of a packed model of qat: {str(manifest)[:100]}")
    if manifest.get("version") != VERSION:
        raise ValueError(f"version {manifest.get('version')!r} of the packed format is not known; this qat reads {VERSION}")
    wrong = sorted(set(manifest) ^ set(_KEYS), key=str)
    if wrong:
        raise ValueError(f"the manifest's key {wrong[0]!r} is {'not known' if wrong[0] in manifest else 'missing'}")
    layers = _mapping(manifest, "layers", int)
    if not layers or min(layers.values()) < 1:
        raise ValueError("the manifest's layers must give an in_features of at least 1 each")
    get_layout(str(manifest["layout"]))
    try:
        config = QuantConfig(**_mapping(manifest, "quant", object))
    except TypeError as error:
        raise ValueError(f"the manifest's quant is wrong: {error}") from error
    refuse_unmatched(config, layers)
    skipped = _mapping(manifest, "skipped", str)
    if sealed(manifest) != dict(manifest):
        raise ValueError("the manifest is damaged: its checksum is not the one that was written")
    return Conversion("packed", config, list(layers), skipped, manifest["layout"]), layers


def _mapping(manifest: Mapping[str, Any], key: str, kind: type) -> dict[str, Any]:
    found = manifest[key]
    if not isinstance(found, Mapping) or not all(type(v) is kind or kind is object for v in found.values()):
        raise ValueError(f"the manifest's {key} must map names to {'values' if kind is object else kind.__name__}")
    return dict(found)
