"""The quantized layers of two files under common names, so that they can be compared.

Between folders the names are transformers' own. A GGUF file has llama.cpp's names and row order; beside one, a folder's layers
are renamed and reordered as an export of ours would, by the folder's config (`gguf_models`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qat.formats.contents import Codes, Contents
from qat.formats.folder import one_line

if TYPE_CHECKING:
    from qat.formats.gguf.architectures import Architecture

Layers = Mapping[str, Callable[[], Codes]]


def matched(one: Contents, two: Contents) -> tuple[Layers, Layers]:
    """The layers of both; by GGUF's names where one of the two is a GGUF file.

    Raises:
        ValueError: the folder has no config, or is a model of another architecture than the GGUF file's.
    """
    if one.architecture and not two.architecture:
        return one.layers, _in_gguf(two, one.architecture)
    if two.architecture and not one.architecture:
        return _in_gguf(one, two.architecture), two.layers
    return one.layers, two.layers


def _in_gguf(found: Contents, architecture: str) -> Layers:
    from qat.formats.gguf import architectures as gguf_models

    config = _config(found)
    named = gguf_models.architecture(config)
    if named.name != architecture:
        raise ValueError(f"the GGUF file is a {architecture}, but the {found.kind} would be a {named.name} in GGUF")
    names = gguf_models.Names(named, config.num_hidden_layers)
    return {
        names[f"{name}.weight"].removesuffix(".weight"): partial(_ordered, read, name, named, config)
        for name, read in found.layers.items()
    }


def _config(found: Contents) -> Any:
    from transformers import AutoConfig

    if found.folder is None:
        raise ValueError(f"the {found.kind} have no config.json, by which their layers would get the names that GGUF has")
    try:
        return AutoConfig.from_pretrained(found.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly any class here
        raise ValueError(f"{found.folder / 'config.json'} is not a transformers config: {one_line(error)}") from error


def _ordered(read: Callable[[], Codes], name: str, named: Architecture, config: Any) -> Codes:
    codes = read()
    order = named.row_order(name, len(codes.codes), config)
    if order is None:
        return codes
    scale = codes.scale[order] if len(codes.scale) > 1 else codes.scale
    return replace(codes, codes=codes.codes[order], scale=scale)
