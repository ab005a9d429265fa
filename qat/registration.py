"""`import qat` teaches transformers to load our folders, whichever of the two is imported first, and imports neither torch
nor transformers for it.

transformers discovers no plug-ins: its public hook is a call (`register_quantizer`) that needs the module holding its table.
Importing that module here would cost every `import qat` three seconds, and machines with torch alone could not import qat at
all; asking users for a call of their own would leave the commonest program, `import qat` above `from transformers import ...`,
without it. So where transformers is not there yet, the call waits until that one module is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TABLE = "transformers.quantizers.auto"
_OURS = "qat.formats.packed.quantizer"
_OF_TORCHAO = "torchao.prototype.safetensors.safetensors_support"


def register() -> None:
    """Register our quantizer with transformers: now if its table is imported, otherwise when it will be."""
    if _TABLE in sys.modules:
        import_module(_OURS)
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


class _TableFinder(MetaPathFinder):
    """Finds the table as the usual machinery does, with a loader that registers right after it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, usual: Any) -> None:
        self.usual = usual

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.usual
        with _torchao_later():
            self.usual.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _TableFinder)]
        import_module(_OURS)


@contextmanager
def _torchao_later() -> Iterator[None]:
    """Its import by transformers' table waits until the one function that is taken of it is called.

    Where torchao is installed, each program that loads a model would otherwise begin with its notes about kernels that do not
    load, and wait two seconds for what it does not use.
    """
    if _OF_TORCHAO in sys.modules:
        yield
        return
    sys.modules[_OF_TORCHAO] = stand_in = ModuleType(_OF_TORCHAO)
    stand_in.__getattr__ = _later  # type: ignore[method-assign]
    try:
        yield
    finally:
        sys.modules.pop(_OF_TORCHAO, None)


def _later(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*arguments: Any, **named: Any) -> Any:
        return getattr(import_module(_OF_TORCHAO), name)(*arguments, **named)

    return call
