"""What Hydra must know before it composes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore

from qat.config.compose.keys import config_folder
from qat.config.compose.yaml_files import read_yaml
from qat.config.run import TrainConfig
from qat.storage import local

GLOBAL = "# @package _global_"


def register(settings: Sequence[str] = (), config_dir: str | None = None) -> None:
    """Give Hydra the schema and, as members of the group `recipe`, every file of recipes/.

    A search path cannot do it: Hydra names a group after its folder, and such groups are missing from `--help`.
    A damaged file stops only those runs whose settings choose it.

    Raises:
        ValueError: a file that is chosen is damaged, or a recipe of `config_dir` does not say that its keys are global.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=TrainConfig)
    for file in sorted(config_folder("recipes").glob("*.yaml")):
        try:
            store.store(group="recipe", name=file.stem, node=read_yaml(file), package="_global_")
        except ValueError:
            if _chosen(settings, "recipe", file.stem):
                raise
    for folder in [config_folder("conf"), *([_existing(config_dir)] if config_dir else [])]:
        for file in folder.glob("*/*.yaml"):
            if _chosen(settings, file.parent.name, file.stem):
                _check_file(file)


def _chosen(settings: Sequence[str], group: str, name: str) -> bool:
    return any(key.lstrip("+") == group and name in value for key, _, value in (s.partition("=") for s in settings))


def _existing(folder: str) -> Path:
    if not local(folder).is_dir():
        raise ValueError(f"--config-dir {folder}: there is no such folder")
    return local(folder)


def _check_file(file: Path) -> None:
    read_yaml(file)
    if file.parent.name == "recipe" and not file.read_text().lstrip().startswith(GLOBAL):
        raise ValueError(f"{file}: a recipe's first line must be {GLOBAL!r}, or its keys would lie below `recipe`")
