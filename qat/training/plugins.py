"""Objects that a configuration names by `_target_`: the optimizer, further loggers and callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from torch import nn

from qat.config import TrainConfig


def instantiated(node: dict[str, Any], **more: Any) -> Any:
    """The object that `_target_` names, made from the node's other keys; ValueError, on one line, where that fails."""
    try:
        return instantiate(node, _convert_="all", **more)
    except InstantiationException as error:
        raise ValueError(f"{node.get('_target_')}: {error.__cause__ or str(error).partition(', set env')[0]}") from error


def optimizer_factory(config: TrainConfig) -> Any:
    """The user's optimizer, to be called with parameter groups; tried by one step on parameters of no meaning.

    Raises:
        ValueError: it cannot be made with its arguments, or does not step.
    """
    optim = config.optim
    factory = instantiated({**optim.optimizer, "_partial_": True})
    weights = [nn.Parameter(torch.ones([2] * n)) for n in (1, 2)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    groups = [{"name": f"{weight.ndim}-D", "params": [weight], "lr": optim.lr, "weight_decay": 0.0} for weight in weights]
    try:
        factory(groups).step()
    except Exception as error:  # whatever another's class raises at wrong arguments
        said = ", ".join(f"optim.optimizer.{key}={value}" for key, value in optim.optimizer.items())
        raise ValueError(f"{said}: this optimizer cannot be used: {error or type(error).__name__}") from error
    return factory


def check_plugins(config: TrainConfig) -> None:
    """Raise ValueError for a callback or logger whose target cannot be imported, before anything is loaded."""
    for section in ("callbacks", "logger"):
        for name, node in getattr(config, section).items():
            try:
                get_object(node["_target_"])
            except Exception as error:  # an import runs whatever the module holds
                reason = " ".join(str(error).split())
                raise ValueError(f"{section}.{name}._target_={node['_target_']} cannot be imported: {reason}") from error


def plugins(config: TrainConfig, folder: Path) -> tuple[list[Any], list[Any]]:
    """The user's loggers and callbacks."""
    loggers = [instantiated(node, save_dir=str(folder)) for node in config.logger.values()]
    return loggers, [instantiated(node) for node in config.callbacks.values()]
