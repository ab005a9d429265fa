"""The configuration of an earlier run, as its folder holds it.

The folder may come from others, so nothing in it is resolved or called: no interpolations, targets from a table alone
(`qat.config.compose.targets`), code of a model only if the command line says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.config.compose.composing import one_line
from qat.config.compose.errors import first_lines
from qat.config.compose.targets import check_targets
from qat.config.compose.yaml_files import read_yaml
from qat.config.run import TrainConfig
from qat.storage import write_text

ASKED = ("resume", "dry_run", "trust_targets")
"""Keys that hold for one command and are never taken from a folder."""


def load_config(folder: str, overrides: list[str] | None = None) -> TrainConfig:
    """The configuration of an earlier run with `overrides` in Hydra's grammar, to continue it.

    Raises:
        ValueError: the folder holds no run, what it holds is damaged or not to be trusted, or an override cannot apply.
    """
    from qat.config.compose.resume import resumed

    return resumed(folder, overrides or [])[0]


def read_saved(folder: str) -> DictConfig:
    """A run's config.yaml with the schema's types, checked but not yet trusted.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        raise ValueError(f"resume={folder}: there is no run, {file} is missing")
    values = read_yaml(file)
    for key in ASKED:
        values.pop(key, None)
    if found := next(_interpolations(OmegaConf.to_container(values)), None):
        raise ValueError(f"resume={folder}: {file.name} has the interpolation {found!r}; a saved configuration has values only")
    try:
        saved = OmegaConf.merge(OmegaConf.structured(TrainConfig), values)
    except OmegaConfBaseException as error:
        raise ValueError(f"resume={folder}: {file.name} is damaged: {first_lines(error)}") from error
    assert isinstance(saved, DictConfig)
    return saved


def saved_config(folder: str) -> TrainConfig:
    """A run's configuration to compare with; nothing that it names is to be trusted or made.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    with one_line():
        config = OmegaConf.to_object(read_saved(folder))
    assert isinstance(config, TrainConfig)
    return config


def _interpolations(node: Any) -> Iterator[str]:
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _interpolations(value)
    elif isinstance(node, str) and "${" in node:
        yield node


def check_trust(folder: str, values: dict[str, Any], said: set[str]) -> None:
    """Refuse code that only the folder asks for; `said` are the keys that the command line set.

    Raises:
        ValueError: a target beyond the table, or a model's own code.
    """
    try:
        check_targets(values, said)
    except ValueError as error:
        raise ValueError(f"resume={folder}: {error}") from error
    if values["model"]["trust_remote_code"] and "model.trust_remote_code" not in said:
        raise ValueError(
            f"resume={folder}: its config.yaml lets the model {values['model']['path']!r} run its own code; if you trust both,"
            " say it again: model.trust_remote_code=true"
        )


def save_config(config: TrainConfig, folder: Path) -> None:
    """Write config.yaml, whole or not at all; without what holds for one command."""
    kept = replace(config, **{key: getattr(TrainConfig, key) for key in ASKED})
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(kept)))
