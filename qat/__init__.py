"""qat: pretrained model in, ternary or binary BitLinear model out, fine-tuned with the quantization in the loop.

Names load on first use, because torch alone takes more than a second to import. Folders of packed models load with
`transformers.AutoModel...from_pretrained` from here on.
"""

from importlib import import_module
from typing import Any

from qat.namesakes import warn as _warn
from qat.registration import register as _register

__version__ = "0.1.0"

_HOME = {
    "QuantConfig": "qat.config",
    "TrainConfig": "qat.config",
    "BitLinear": "qat.nn.bitlinear",
    "PackedBitLinear": "qat.nn.packed",
    "Conversion": "qat.conversion.record",
    "convert": "qat.conversion.walker",
    "pack": "qat.conversion.walker",
    "unpack": "qat.conversion.walker",
}

__all__ = ["__version__", "ops", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name == "ops":
        return import_module("qat.ops")
    raise AttributeError(f"module 'qat' has no attribute {name!r}")


_warn()
_register()
