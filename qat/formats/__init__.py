"""Formats in which a packed model leaves qat, one file a format, each read back by the format's own reader.

`packed` is our own folder and is always written; FORMATS names the others. Nothing heavy is imported here.
"""

from importlib import import_module
from types import ModuleType

FORMATS = {"hf": "qat.formats.bitnet.writing", "gguf": "qat.formats.gguf.writing", "pt2": "qat.formats.pt2.writing"}


def get_format(name: str) -> ModuleType:
    """The module of a format, with `unsupported`, `save`, `verify` and `OPTIONS`, the names of `save`'s own keywords.

    Raises:
        ValueError: naming the known ones.
    """
    if name not in FORMATS:
        raise ValueError(f"format={name!r} is not known; choose one of {', '.join(FORMATS)}")
    return import_module(FORMATS[name])
