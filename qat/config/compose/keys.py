"""Which groups, options and keys there are; without Hydra, so that help comes at once."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qat.config.run import TrainConfig


def config_folder(name: str) -> Path:
    """The folder `conf` or `recipes`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise ValueError(f"the folder {name!r} is missing beside {package}; the installation is incomplete")


def options() -> dict[str, list[str]]:
    """Group -> the names that may be chosen in it, recipes first; read from the file names alone."""
    groups = {"recipe": sorted(file.stem for file in config_folder("recipes").glob("*.yaml"))}
    for folder in sorted(config_folder("conf").iterdir()):
        if folder.is_dir() and (names := sorted(file.stem for file in folder.glob("*.yaml"))):
            groups[folder.name] = names
    return groups


def check_keys(arguments: list[str]) -> None:
    """Raise ValueError for an override `a.b=value` whose key does not exist, naming the nearest ones.

    Hydra's own message names neither. Keys below `callbacks`, `logger` and the two of `optim` are free, and so are Hydra's.
    """
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        key = key.lstrip("+~")
        if equals and key.replace(".", "").replace("_", "").isalnum() and not key.startswith(("hydra.", "recipe")):
            _check_key(key)


def _check_key(key: str) -> None:
    node: Any = TrainConfig()
    walked: list[str] = []
    for part in key.split("."):
        if isinstance(node, dict):
            return
        names = [f.name for f in fields(node)] if is_dataclass(node) else []
        if part not in names:
            where = ".".join(walked)
            near = get_close_matches(part, names, n=1)
            hint = f"; did you mean {'.'.join([*walked, near[0]])}" if near else ""
            allowed = ", ".join([*names, "recipe"] if not walked else names)
            known = f"Allowed{f' in {where}' if where else ''}: {allowed}" if names else f"{where} has no keys below it"
            raise ValueError(f"there is no key {key!r}{hint}. {known}")
        node = getattr(node, part)
        walked.append(part)
