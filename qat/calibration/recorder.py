"""What reaches a layer while a model runs, and what its output is added to.

A layer that writes into the residual stream is known by what happens to its output, whatever it is called: as it is, or only
reshaped, it is added to tensors of its own shape that were there before it was called. Their sum is kept, so that the layer can
make good for what the stream has lost before it. An output that is scaled or normed first is not followed: what the layer would
have to add is not known there. What was made after the call (a sum's other half in a parallel block, a term of an activation
function) is none of the stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Value = TypeVar("Value")

_SAME = re.compile(r"view|reshape|flatten|unflatten|contiguous|to|float|type|dropout|squeeze|unsqueeze|clone|type_as|view_as")
_ADDS = re.compile(r"add|radd|iadd")


@dataclass
class Call:
    """One call of a layer."""

    name: str
    input: Tensor
    """[..., K], as it was given."""
    stream: Tensor | None = None
    """What the output was added to, of the output's shape."""

    def add(self, other: Tensor) -> None:
        """Count `other` to the stream; by value, as the sum may take its place."""
        with torch._C.DisableTorchFunction():
            other = other.detach()
            self.stream = other.clone() if self.stream is None else self.stream + other


@dataclass(frozen=True)
class Arguments:
    """What a module is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def first(self) -> Any:
        """The first argument, which is the hidden state of a block."""
        return next(iter((*self.args, *self.kwargs.values())), None)

    def on(self, hidden: Any) -> Arguments:
        """The same on another first argument."""
        if self.args:
            return Arguments((hidden, *self.args[1:]), self.kwargs)
        key = next(iter(self.kwargs))
        return Arguments((), {**self.kwargs, key: hidden})


def record(
    module: nn.Module, arguments: Arguments, layers: Mapping[str, nn.Module], most: int | None = None
) -> tuple[list[Call], Any]:
    """Run `module`: every call of `layers` (name -> module), in order, and the output; None where `most` calls ended the run."""
    with Recorder(layers, most) as recorder:
        try:
            output = module(*arguments.args, **arguments.kwargs)
        except _Enough:
            output = None
    return recorder.calls, output


class _Enough(Exception):
    """The calls that were wanted have been seen."""


class Recorder(TorchFunctionMode):
    """A context around a model's run, which it ends by `_Enough` after `most` calls."""

    def __init__(self, layers: Mapping[str, nn.Module], most: int | None = None) -> None:
        super().__init__()
        self.layers, self.most = layers, most
        self.calls: list[Call] = []
        self._handles: list[Any] = []
        self._followed = _Notes[list[tuple[int, Call]]]()
        """Which calls' outputs are in a tensor, alone or summed, each with its number, from 1."""
        self._born = _Notes[int]()
        """How many calls there were before a tensor was made."""

    def __enter__(self) -> Recorder:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._noting(name), with_kwargs=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _noting(self, name: str) -> Any:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            call = Call(name, next(iter((*args, *kwargs.values()))))
            self.calls.append(call)
            self._followed.put(output, [(len(self.calls), call)])
            self._born.put(output, len(self.calls))
            if len(self.calls) == self.most:
                raise _Enough

        return note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        found = self._added(args) if _ADDS.fullmatch(name) else self._same(args) if _SAME.fullmatch(name) else []
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            if self._born.get(output) is None:
                self._born.put(output, len(self.calls))
            if found and output.numel() == args[0].numel():
                self._followed.put(output, found)
        return output

    def _same(self, args: Any) -> list[tuple[int, Call]]:
        """The calls whose outputs are in the first argument."""
        return (self._followed.get(args[0]) if args else None) or []

    def _added(self, args: Any) -> list[tuple[int, Call]]:
        """The calls whose outputs are in the operands of a sum; each gets the other operand if that is older."""
        if len(args) < 2 or not all(isinstance(one, Tensor) for one in args[:2]) or args[0].shape != args[1].shape:
            return []
        found = []
        for one, other in (args[:2], args[1::-1]):
            for number, call in self._followed.get(one) or []:
                found.append((number, call))
                if (self._born.get(other) or 0) < number:
                    call.add(other)
        return found


class _Notes(Generic[Value]):
    """Something noted of tensors, as long as these live."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[ref[Tensor], Value]] = {}

    def put(self, tensor: Tensor, value: Value) -> None:
        self._values[id(tensor)] = ref(tensor), value

    def get(self, tensor: Any) -> Value | None:
        found = self._values.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None
