"""Objects that a configuration names by `_target_`: the optimizer, further loggers and callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from qat.config import TrainConfig


def instantiated(node: dict[str, Any], **more: Any) -> Any:
    """The object that `_target_` names, made from the node's other keys; ValueError, on one line, where that fails."""
    try:
        return instantiate(node, _convert_="all", **more)
    except InstantiationException as error:
        raise ValueError(f"{node.get('_target_')}: {error.__cause__ or str(error).partition(', set env')[0]}") from error


def optimizer_factory(config: TrainConfig) -> Any:
    """The user's optimizer, to be called with parameter groups."""
    return instantiated({**config.optim.optimizer, "_partial_": True})


def plugins(config: TrainConfig, folder: Path) -> tuple[list[Any], list[Any]]:
    """The user's loggers and callbacks."""
    loggers = [instantiated(node, save_dir=str(folder)) for node in config.logger.values()]
    return loggers, [instantiated(node) for node in config.callbacks.values()]
