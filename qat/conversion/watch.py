"""What a model does with its linear layers while it runs: who calls them, who reads their weights, what their outputs decide.

A torch function mode sees every operation with its arguments, whatever the modules are called and however their source is
written. A layer is running while its own forward is; a weight that is an argument while it is not is read by someone else, whom
the quantized layer's forward would never reach. An output is followed through what only reshapes or rescales it: where it then
picks (topk) or, being narrow, weighs (softmax, sigmoid), the layer is a selector; where it is exponentiated, a decay.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ROWS = 8  # of a layer's input that are kept

_ASKS = re.compile(
    r"dtype|device|shape|size|dim|ndim|numel|nelement|is_floating_point|is_complex|element_size|itemsize|nbytes"
    r"|layout|requires_grad|is_cuda|is_cpu|is_meta|is_mps|is_xpu|is_quantized|is_sparse|grad|grad_fn|is_leaf|stride"
    r"|storage_offset|is_contiguous|data_ptr|len|get_device|names|register_hook|zeros_like|empty_like|ones_like"
    r"|full_like|rand_like|randn_like|new_zeros|new_empty|new_ones|new_full|new_tensor|is_same_size|hash"
    r"|untyped_storage|is_pinned|is_inference|is_shared|version|result_type|can_cast|is_tensor|is_nonzero|retain_grad"
    r"|retains_grad"
)
"""Functions that read no values of a tensor, by their names without underscores at the ends."""
_OF_ANOTHER = re.compile(r"to|type_as|expand_as|view_as|reshape_as")
"""Those that read no values of their second argument."""
_ALIASES = re.compile(r"data|detach|alias")
_RESHAPES = re.compile(
    r"view|reshape|flatten|unflatten|transpose|permute|squeeze|unsqueeze|contiguous|to|float|type|half|bfloat16|double"
    r"|clone|T|mT|swapaxes|swapdims|movedim|expand|dropout|t|split|chunk|getitem|narrow|unbind|select"
    r"|split_with_sizes|tensor_split"
)
_RESCALES = re.compile(
    r"sigmoid|softmax|log_softmax|relu|softplus|logsigmoid|log_sigmoid|exp|exp2|neg|clamp|clamp_min|clamp_max|abs|masked_fill"
    r"|add|sub|mul|div|true_divide|truediv|cumsum|pad|radd|rsub|rmul|iadd|isub|imul|itruediv|sum|log|log1p|tanh|silu|gelu"
    r"|hardsigmoid|pow|square|sqrt|where|minimum|maximum|normalize"
)
_PICKS = re.compile(r"topk|argmax|argsort|sort|kthvalue|multinomial|one_hot|gumbel_softmax")
_WEIGHS = re.compile(r"softmax|log_softmax|sigmoid|softplus|logsigmoid|log_sigmoid|exp|exp2|gumbel_softmax|tanh|hardsigmoid")
_DECAYS = re.compile(r"exp|exp2|cumprod")
NARROW = 4  # a layer's inputs for one output, from which it is narrow


@dataclass
class Seen:
    """What was seen of one layer."""

    called: bool = False
    gradient: bool = False
    in_training: bool = False
    """Whether it was called in training mode; true where that was not to be seen."""
    frozen: bool = False
    """Not trained, in a model that trains other layers."""
    reader: str = ""
    """Who read its weight while its forward was not running."""
    decides: str = ""
    """What its output, or what was made of it alone, went into, in words."""
    feeds: set[str] = field(default_factory=set)
    """The layers that took its output as it was."""
    input: Tensor | None = None
    """Up to ROWS rows [R, in_features] of the first input."""


Mark = tuple[str, bool]  # a layer, and whether the tensor holds all of its output


class Watch(TorchFunctionMode):
    """Use as a context around a model's run; `seen` has a record for each of `layers` (name -> module with a 2-D weight)."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        frozen = {name for name, layer in layers.items() if not layer.weight.requires_grad}
        some = len(frozen) < len(layers)
        self.layers, self.seen = layers, {name: Seen(frozen=some and name in frozen) for name in layers}
        self.training = False
        """Whether the run that is watched is one in training mode."""
        self._running: list[str] = []
        self._owners: dict[int, list[str]] = {}
        self._marks: dict[int, tuple[Tensor, frozenset[Mark]]] = {}  # with the tensor, so that its id is not used again
        for name, layer in layers.items():
            self._owners.setdefault(_place(layer.weight), []).append(name)  # type: ignore[arg-type]

    def __enter__(self) -> Watch:
        for name, layer in self.layers.items():
            layer.forward = self._watched(name, layer.forward)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._marks.clear()
        for layer in self.layers.values():
            del layer.forward

    def _watched(self, name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*args: Any, **kwargs: Any) -> Tensor:
            self._running.append(name)
            try:
                output = forward(*args, **kwargs)
            finally:
                self._running.pop()
            self._note_call(name, next(iter((*args, *kwargs.values()))), output)
            return output

        return watched

    def _note_call(self, name: str, x: Tensor, output: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            if not output.numel():
                return
            seen = self.seen[name]
            seen.called = True
            seen.in_training = seen.in_training or self.training
            if seen.input is None:
                seen.input = x.detach().reshape(-1, x.shape[-1])[:ROWS].clone()
            for source, whole in self._marked(x):
                if whole:
                    self.seen[source].feeds.add(name)
            self._mark(output, frozenset({(name, True)}))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        self._note_reads(name, args, kwargs)
        output = func(*args, **kwargs)
        if not self._running:
            self._follow(name, args, output)
        return output

    def _note_reads(self, function: str, args: Any, kwargs: Any) -> None:
        if _ASKS.fullmatch(function) or _ALIASES.fullmatch(function):
            return
        values = args[:1] if _OF_ANOTHER.fullmatch(function) else (*args, *kwargs.values())
        if function == "type" and len(args) == 1:
            return
        for tensor in _tensors(values):
            owners = self._owners.get(_place(tensor))
            if owners and not any(name in self._running for name in owners):
                reader = _caller()
                for name in owners:
                    self.seen[name].reader = self.seen[name].reader or reader

    def _follow(self, function: str, args: Any, output: Any) -> None:
        operands = list(_tensors(args))
        marks = frozenset[Mark]().union(*map(self._marked, operands))
        if marks:
            self._note_decisions(function, marks, function == "max" and _one_of_each_row(operands, output))
        follows = _RESHAPES.fullmatch(function) or _RESCALES.fullmatch(function)
        if not follows or not all(self._marked(one) or self._constant(one) for one in operands):
            return
        size = max((one.numel() for one in operands if self._marked(one)), default=0)
        for part in _tensors((output,)):
            self._mark(part, frozenset((name, whole and part.numel() >= size) for name, whole in marks))

    def _constant(self, tensor: Tensor) -> bool:
        """Whether it comes of parameters alone, or of nothing that is trained."""
        found = self._marks.get(id(tensor))
        return tensor.is_leaf or not tensor.requires_grad or (found is not None and found[0] is tensor and not found[1])

    def _note_decisions(self, function: str, marks: frozenset[Mark], largest: bool) -> None:
        for name, whole in marks:
            n, k = self.layers[name].weight.shape  # type: ignore[misc]
            narrow = n * NARROW <= k
            if (_PICKS.fullmatch(function) or largest) and (narrow or (whole and n < k)):
                self._decide(name, f"its output is picked from ({function})")
            elif _WEIGHS.fullmatch(function) and narrow:
                self._decide(name, f"{n} numbers for {k} that weigh something ({function})")
            elif _DECAYS.fullmatch(function) and whole:
                self._decide(name, "its output is exponentiated: a decay or a scale")

    def _decide(self, name: str, words: str) -> None:
        if not self.seen[name].decides:
            self.seen[name].decides = words

    def _mark(self, tensor: Tensor, marks: frozenset[Mark]) -> None:
        self._marks[id(tensor)] = (tensor, marks)

    def _marked(self, tensor: Any) -> frozenset[Mark]:
        found = self._marks.get(id(tensor))
        return found[1] if found is not None and found[0] is tensor else frozenset()


def _name_of(func: Any) -> str:
    name = func.__name__ if hasattr(func, "__name__") else str(func)
    return (func.__self__.__name__ if name in ("__get__", "__set__") else name).strip("_")


def _one_of_each_row(operands: list[Tensor], output: Any) -> bool:
    """Whether a maximum is taken over the last dimension, and where it lies is given, too: over tokens it would pool."""
    return (
        isinstance(output, tuple)
        and output[0].numel() * operands[0].shape[-1] == operands[0].numel()
        and (output[0].shape in (operands[0].shape[:-1], (*operands[0].shape[:-1], 1)))
    )


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _place(tensor: Tensor) -> int:
    """What a parameter and its aliases have in common: where their values begin."""
    try:
        return tensor.data_ptr() or id(tensor)
    except (RuntimeError, ValueError):  # tensor subclasses without memory of their own
        return id(tensor)


def _caller() -> str:
    """The innermost function that is not torch's or this file's, in words."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and module.partition(".")[0] != "torch":
            break
        frame = frame.f_back
    return frame.f_code.co_qualname.replace(".<locals>", "")
