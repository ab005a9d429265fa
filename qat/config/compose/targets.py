"""Which `_target_`s a saved configuration may name.

A run's folder may come from others, and instantiating a `_target_` calls anything that Python can import. So what a folder says
is held against this table, one level deep; what the user types is the user's own word and stays free. Rejected: to allow whole
packages by prefix, since a module's attributes lead everywhere (torch.optim.optimizer.os.system).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

KNOWN = {
    "torch.optim": "optimizers",
    "qat.training.gradients.eight_bits": "optimizers of qat",
    "qat.training.gradients.offloaded": "optimizers of qat",
    "lightning.pytorch.callbacks": "callbacks",
    "lightning.pytorch.loggers": "loggers",
    "qat.training.callbacks": "callbacks of qat",
    "qat.training.loggers": "loggers of qat",
}
"""Modules whose classes a saved configuration may name, by `MODULE.Class` and no longer path."""

_CLASS = re.compile(r"[A-Z][A-Za-z0-9]*")


def check_targets(values: dict[str, Any], said: set[str]) -> None:
    """Check callbacks, loggers and the optimizer of a saved configuration before anything is instantiated.

    `said` are the keys that the command line set, as `callbacks.mine`: these are not checked.

    Raises:
        ValueError: a target that the table does not have, or one within another's arguments.
    """
    for key, node in _nodes(values):
        if not _was_said(key, said):
            _check(key, node)


def _nodes(values: dict[str, Any]) -> list[tuple[str, Any]]:
    optim = values.get("optim") or {}
    found = [("optim.optimizer", optim.get("optimizer") or {})]
    found += [("optim.latent_optimizer", node)] if (node := optim.get("latent_optimizer")) else []
    for section in ("callbacks", "logger"):
        found += [(f"{section}.{name}", node) for name, node in (values.get(section) or {}).items()]
    return found


def _was_said(key: str, said: set[str]) -> bool:
    return any(one in (key, f"{key}._target_", key.partition(".")[0]) for one in said)


def _check(key: str, node: Any) -> None:
    target = node.get("_target_") if isinstance(node, dict) else None
    module, _, name = str(target).rpartition(".")
    if not _CLASS.fullmatch(name) or not (module in KNOWN or _is_ours(module, name)):
        _refuse(key, f"_target_={target!r}", f"known are the classes of {', '.join(KNOWN)}")
    inner = {name for value in node.values() for name in _special(value)} | {k for k in _own(node) if k != "_target_"}
    if inner:
        _refuse(key, f"{sorted(inner)[0]!r} among its arguments", "a saved target has plain arguments")


def _is_ours(module: str, name: str) -> bool:
    """Whether `name` is a class that a file of qat/training/callbacks defines: what it merely imports is not meant."""
    package, _, file = module.rpartition(".")
    if package != "qat.training.callbacks" or not file.isidentifier():
        return False
    source = Path(__file__).resolve().parents[2] / "training" / "callbacks" / f"{file}.py"
    return source.is_file() and f"\nclass {name}(" in source.read_text(encoding="utf-8")


def _own(node: dict[str, Any]) -> set[str]:
    return {str(key) for key in node if str(key).startswith("_")}


def _special(value: Any) -> set[str]:
    if isinstance(value, dict):
        return _own(value).union(*(_special(one) for one in value.values()))
    return set().union(*(_special(one) for one in value)) if isinstance(value, list) else set()


def _refuse(key: str, what: str, why: str) -> None:
    raise ValueError(
        f"{key} of the saved configuration has {what}, which can run any code; {why}. If you trust the folder, add"
        f" trust_targets=true, or say {key}._target_=... yourself"
    )
