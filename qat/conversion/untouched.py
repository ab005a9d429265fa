"""Run a model and leave no trace: modes, buffers, gradients, caches in attributes and random numbers come back as they were.

Rejected: a deep copy of the model, which doubles its memory and takes longer than the run. A parameter is copied when something
is about to write to it (RWKV divides some in eval mode).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CONTAINERS = (dict, list, set)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside, `model` and the random number generators are afterwards as they were before."""
    with ExitStack() as stack:
        for keep in (_attributes, _tensors, _parameters):
            stack.callback(keep(model))
        stack.enter_context(_random_numbers(model))
        writes = _Writes(model)
        stack.callback(writes.restore)
        stack.enter_context(writes)
        yield


class _Writes(TorchFunctionMode):
    """Keeps the values of a parameter before it is written to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._at = {parameter.data_ptr(): parameter for parameter in model.parameters() if parameter.data_ptr()}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and _writes(func):
            parameter = args[0] if isinstance(args[0], nn.Parameter) else self._at.get(args[0].data_ptr())
            if parameter is not None and id(parameter) not in self._kept:
                self._kept[id(parameter)] = (parameter, parameter.detach().clone())
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, values in self._kept.values():
            if parameter.shape == values.shape and parameter.dtype == values.dtype:
                parameter.copy_(values)
            else:
                parameter.data = values


def _writes(func: Any) -> bool:
    """Whether a function writes to its first argument, by its name: `div_`, `__imul__`, `__setitem__`, the setter of `data`."""
    function = getattr(func, "__name__", "")
    if function == "__set__":
        return func.__self__.__name__ == "data"
    if function.startswith("__"):
        return function == "__setitem__" or (function.startswith("__i") and function.endswith("__") and function != "__invert__")
    return function.endswith("_") and function not in ("requires_grad_", "retain_grad_")


def _attributes(model: nn.Module) -> Callable[[], None]:
    """Every module's attributes, `training` and hooks among them, and the contents of plain containers."""
    kept = [(module, dict(vars(module)), _contents(vars(module))) for module in model.modules()]

    def restore() -> None:
        for module, attributes, contents in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in contents:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)

    return restore


def _contents(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    """With a copy of each, of an empty one without: a module has a dozen, nearly all empty, and copies of them take time."""
    return [(value, value.copy() if value else ()) for value in attributes.values() if isinstance(value, _CONTAINERS)]


def _tensors(model: nn.Module) -> Callable[[], None]:
    """The values of buffers, those that state dicts leave out, too, and of tensors in attributes: caches, running means."""
    found = [
        tensor
        for module in model.modules()
        for tensor in (*module.buffers(recurse=False), *vars(module).values())
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter) and not tensor.is_meta
    ]
    kept = [(tensor, tensor.detach().clone()) for tensor in found]

    @torch.no_grad()
    def restore() -> None:
        for tensor, values in kept:
            if tensor.shape == values.shape and not _same(tensor, values):
                tensor.detach().copy_(values)

    return restore


def _same(tensor: Tensor, values: Tensor) -> bool:
    return torch.equal(tensor, values)  # NaN is unequal to itself and is then written again


def _parameters(model: nn.Module) -> Callable[[], None]:
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in kept:
        parameter.grad = None

    def restore() -> None:
        for parameter, requires_grad, grad in kept:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad

    return restore


@contextmanager
def _random_numbers(model: nn.Module) -> Iterator[None]:
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None})
    numpy = sys.modules.get("numpy")
    state, numpys = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(numpys)
