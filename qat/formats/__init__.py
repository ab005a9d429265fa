"""Formats in which a packed model leaves qat, a folder each with its reader; their table is `qat.targets.FORMATS`.

`packed` is our own and is always written. Nothing heavy is imported here.
"""

from importlib import import_module
from types import ModuleType

from qat.targets import FORMATS as FORMATS


def get_format(name: str) -> ModuleType:
    """The code of a format: `unsupported`, `save`, `read_back`, `report` and `recorded`.

    Raises:
        ValueError: naming the known ones.
    """
    if name not in FORMATS:
        raise ValueError(f"format={name!r} is not known; choose one of {', '.join(FORMATS)}")
    return import_module(FORMATS[name].module)
