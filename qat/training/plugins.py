"""Objects that a configuration names by `_target_`: the optimizer, further loggers and callbacks."""

from __future__ import annotations

import inspect
import logging
from difflib import get_close_matches
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
)
from torch import nn

from qat.config import TrainConfig, TrainerConfig
from qat.losses import LOSSES
from qat.monitor.table import METRICS, SECTIONS
from qat.reporting import updates
from qat.training.gradients.split import split
from qat.training.loggers import sink_of

logging.getLogger("hydra.utils").addHandler(logging.NullHandler())  # what it says of an import is in our errors


def instantiated(node: dict[str, Any]) -> Any:
    """The object that `_target_` names, made from the node's other keys; ValueError, on one line, where that fails."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise ValueError(f"{node.get('_target_')}: {error.__cause__ or str(error).partition(', set env')[0]}") from error


def optimizer_factory(config: TrainConfig) -> Any:
    """The user's optimizer, or two of them, to be called with parameter groups; tried by a step on parameters of no meaning.

    Raises:
        ValueError: one cannot be made with its arguments, or does not step.
    """
    rest = _tried(config, "optimizer", dimensions=(1, 2))
    return split(_tried(config, "latent_optimizer", dimensions=(2,)), rest) if config.optim.latent_optimizer else rest


def _tried(config: TrainConfig, key: str, dimensions: tuple[int, ...]) -> Any:
    """The factory of optim.`key`, after a step on a parameter of each number of dimensions."""
    optim, said = config.optim, getattr(config.optim, key)
    fused = _fused(said, config.trainer)
    node = {**fused, **_matched(said), **said, "_partial_": True}
    factory = _with_half_life(config, node) if key == "optimizer" else instantiated(node)
    factory = any_rows(factory) if fused else factory
    weights = [nn.Parameter(torch.ones([2] * n)) for n in dimensions]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    groups = [{"name": f"{weight.ndim}-D", "params": [weight], "lr": optim.lr or 1e-3, "weight_decay": 0.0} for weight in weights]
    try:
        made = factory(groups)
        made.step()
    except Exception as error:  # whatever another's class raises at wrong arguments
        words = ", ".join(f"optim.{key}.{name}={value}" for name, value in said.items())
        raise ValueError(f"{words}: this optimizer cannot be used: {error or type(error).__name__}") from error
    if config.trainer.strategy == "fsdp2" and not getattr(made, "shards", True):
        target = f"optim.{key}._target_={said['_target_']}"
        raise ValueError(f"{target} does not fit trainer.strategy=fsdp2, as its state cannot be divided; take torch.optim.AdamW")
    return factory


def _with_half_life(config: TrainConfig, node: dict[str, Any]) -> Any:
    """The optimizer's factory; its second beta is that of `optim.beta2_half_life` where one is set."""
    factory, half_life = instantiated(node), config.optim.beta2_half_life
    if half_life is None:
        return factory
    second = updates.beta2(updates.tokens_per_update(config), half_life)

    def make(groups: list[dict[str, Any]]) -> Any:
        optimizer = factory(groups)
        for group in optimizer.param_groups:
            if not has_betas(group):
                raise ValueError(f"optim.beta2_half_life={half_life:g} needs one with two betas, such as torch.optim.AdamW")
            group["betas"] = (group["betas"][0], second)
        return optimizer

    return make


def has_betas(group: dict[str, Any]) -> bool:
    """Whether the optimizer of this parameter group averages gradients and their squares, as Adam's kin do."""
    return isinstance(group.get("betas"), (tuple, list)) and len(group["betas"]) == 2


def _fused(node: dict[str, Any], trainer: TrainerConfig) -> dict[str, Any]:
    """`fused: true` for an optimizer that has it and was not told: one pass over the weights instead of a dozen calls for each.

    Not in 16-mixed, where lightning refuses to clip the gradients of an optimizer that could unscale them by itself.
    """
    told = {"fused", "foreach", "capturable", "differentiable"} & set(node)
    if told or trainer.precision == "16-mixed":
        return {}
    return {"fused": True} if "fused" in _arguments(node) else {}


def any_rows(factory: Any) -> Any:
    """The factory of an optimizer with fused steps, without them where they would depend on how a weight is divided.

    On a CPU the last elements of a tensor, those that fill no vector register, are rounded otherwise than the others. So any rows
    of a weight are stepped as the whole of it only where rows fill registers. Norms and biases do not, and are few.
    """

    def make(groups: list[dict[str, Any]]) -> Any:
        return factory([group if _full(group) else {**group, "fused": False} for group in groups])

    return make


_REGISTER = 16
"""float32 of the widest vector register, or of a cache line, by which threads share the work."""


def _full(group: dict[str, Any]) -> bool:
    return all(p.device.type != "cpu" or (p.ndim > 1 and p.shape[1:].numel() % _REGISTER == 0) for p in group["params"])


def _matched(node: dict[str, Any]) -> dict[str, Any]:
    """`adjust_lr_fn: match_rms_adamw` for an optimizer that has it (Muon): steps as long as AdamW's, so that one lr fits both."""
    return {"adjust_lr_fn": "match_rms_adamw"} if "adjust_lr_fn" in _arguments(node) else {}


def _arguments(node: dict[str, Any]) -> set[str]:
    """Names that `_target_` takes; none where it cannot be imported, which is said where it is instantiated."""
    try:
        return set(inspect.signature(get_object(node["_target_"])).parameters)
    except Exception:
        return set()


def check_plugins(config: TrainConfig) -> None:
    """Raise ValueError for a callback or logger whose target cannot be imported, before anything is loaded."""
    for section in ("callbacks", "logger"):
        for name, node in getattr(config, section).items():
            try:
                target = get_object(node["_target_"])
            except Exception as error:  # an import runs whatever the module holds
                reason = " ".join(str(error).split())
                raise ValueError(f"{section}.{name}._target_={node['_target_']} cannot be imported: {reason}") from error
            if section == "logger":
                sink_of(target).check(f"logger.{name}", node)


def callbacks(config: TrainConfig) -> list[Callback]:
    """The user's callbacks.

    Raises:
        ValueError: one cannot be made, is no callback, changes what the configuration says, or waits for validations that are
            never made.
    """
    found = [instantiated(node) for node in config.callbacks.values()]
    for callback in found:
        _check_callback(callback, config.trainer)
        _check_watched(callback, found)
    return found


def _check_callback(callback: Any, config: TrainerConfig) -> None:
    name = type(callback).__name__
    if not isinstance(callback, Callback):
        raise ValueError(f"callbacks: {name} is no lightning callback")
    if instead := next((key for kind, key in OF_THE_CONFIGURATION.items() if isinstance(callback, kind)), None):
        raise ValueError(f"callbacks: {name} would change what the run's config.yaml says; set {instead} instead")
    monitor = _watched(callback)
    if config.val_every is None and (monitor.startswith("val/") or isinstance(callback, EarlyStopping)):
        raise ValueError(f"callbacks: {name} watches {monitor}, but there are no validations; set trainer.val_every")


def _watched(callback: Callback) -> str:
    return str(getattr(callback, "monitor", None) or "")


def _check_watched(callback: Callback, beside: list[Callback]) -> None:
    """What it watches is logged through lightning: losses of rows and what validations measure, and no sum of a look.

    A name of no section of ours may be what a callback logs, where one is there that could.
    """
    monitor = _watched(callback)
    section, _, rest = monitor.partition("/")
    sees = section if section in ("train", "val") else "val"
    there = [one for one in METRICS if one.startswith(f"{sees}/") and "{" not in one]
    if not monitor or monitor in (*there, "step", "epoch"):
        return
    if section in ("train", "val", "optim") and rest.removeprefix("grad_norm/") in LOSSES:
        return
    if section not in SECTIONS and any(_may_log(one, monitor) for one in beside):
        return
    what = "callbacks do not see" if monitor in METRICS else "is no metric"
    near = get_close_matches(monitor, dict.fromkeys([*there, *(f"{sees}/{one}" for one in LOSSES)]), 3, 0.7)
    also = f"; near it are {', '.join(near)}" if near else ""
    said = f"callbacks: {type(callback).__name__} watches {monitor}, which {what}"
    raise ValueError(f"{said}; choose one of {', '.join(there)}, or a loss{also}")


def _may_log(callback: Callback, name: str) -> bool:
    """Whether a callback logs metrics of its own: a person's, and lightning's of rates."""
    return not type(callback).__module__.startswith("lightning.") or (
        isinstance(callback, LearningRateMonitor) and name.startswith("lr-")
    )


OF_THE_CONFIGURATION = {
    GradientAccumulationScheduler: "trainer.accumulate_grad_batches",
    BatchSizeFinder: "data.batch_size",
    LearningRateFinder: "optim.lr, or several in a sweep (-m optim.lr=1e-4,1e-3)",
}
"""Callbacks that change a key of the configuration while a run goes on, which no resume could follow; and that key."""
