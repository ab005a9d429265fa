"""In which order a model's layers are calibrated: stages, each run by itself, and in a stage groups that share an input.

A stage is a block of the decoder: an element of the ModuleList that holds most layers, if each is called once, in order, on
what the one before it returned. Then a model is run block by block and no more than two of its activations are kept. Where a
model is built otherwise, or for layers outside its blocks, the stage is the model itself, run again for each group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qat.calibration.recorder import Arguments, Call, record


@dataclass
class Stage:
    """A module, what it is called with in each window, and its layers in groups, in the order of their calls."""

    name: str
    """Of the module; "" is the model."""
    arguments: list[Arguments]
    groups: list[list[str]] = field(default_factory=list)


BlockCall = tuple[str, Arguments, Any]
"""A block's name, what it was called with, and its output."""


def stages(model: nn.Module, layers: Mapping[str, nn.Module], windows: Sequence[Tensor]) -> list[Stage]:
    """The stages of `model` for `layers` (name -> module of it), from its runs on `windows` (input_ids int64 [B, T])."""
    names = _block_names(model, list(layers))
    order: list[list[str]] = []
    kept: dict[str, list[Arguments]] = {name: [] for name in names}
    for ids in windows:
        calls, blocks = _trace(model, layers, names, ids)
        order += _groups(calls, {name for group in order for name in group})
        if not _chained(names, blocks):
            names = []
        for name, arguments, _ in blocks if names else ():
            kept[name].append(arguments if name == names[0] else arguments.on(None))
    order += [[name] for name in layers if not any(name in group for group in order)]
    return _assigned(order, names, kept, windows)


def _assigned(
    order: list[list[str]], names: list[str], kept: dict[str, list[Arguments]], windows: Sequence[Tensor]
) -> list[Stage]:
    """Layers before the first block, the blocks, layers behind the last."""
    blocks = {name: Stage(name, kept[name]) for name in names}
    before, after = (Stage("", [whole(ids) for ids in windows]) for _ in range(2))
    begun = False
    for group in order:
        owner = next((name for name in names if group[0].startswith(f"{name}.")), None)
        begun = begun or owner is not None
        (blocks[owner] if owner is not None else after if begun else before).groups.append(group)
    return [stage for stage in (before, *blocks.values(), after) if stage.groups or stage.name]


def _block_names(model: nn.Module, layers: list[str]) -> list[str]:
    """The elements of the ModuleList that holds most layers; of several, the outermost."""
    best: list[str] = []
    most = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            held = sum(layer.startswith(f"{name}.") for layer in layers)
            if held > most:
                best, most = [f"{name}.{i}" for i in range(len(module))], held
    return best


def _trace(
    model: nn.Module, layers: Mapping[str, nn.Module], names: list[str], ids: Tensor
) -> tuple[list[Call], list[BlockCall]]:
    blocks: list[BlockCall] = []

    def noting(name: str) -> Any:
        return lambda _, args, kwargs, output: blocks.append((name, Arguments(args, dict(kwargs)), output))

    handles = [model.get_submodule(name).register_forward_hook(noting(name), with_kwargs=True) for name in names]
    try:
        calls, _ = record(model, whole(ids), layers)
    finally:
        for handle in handles:
            handle.remove()
    return calls, blocks


def whole(ids: Tensor) -> Arguments:
    """What a causal language model is called with."""
    return Arguments((), {"input_ids": ids, "use_cache": False})


def _groups(calls: list[Call], known: set[str]) -> list[list[str]]:
    """Layers that are not known yet: those that follow one another on one and the same input together."""
    found: list[list[str]] = []
    last: Tensor | None = None
    for call in calls:
        if call.name not in known:
            if call.input is last:
                found[-1].append(call.name)
            else:
                found.append([call.name])
                last = call.input
            known.add(call.name)
    return found


def hidden(output: Any) -> Any:
    """The hidden state that a block returns: its output, or the first of it."""
    return output[0] if isinstance(output, tuple | list) else output


def _chained(names: list[str], blocks: list[BlockCall]) -> bool:
    """Whether each block was called once, in order, on what the one before it gave."""
    if [name for name, *_ in blocks] != names:
        return False
    pairs = zip(blocks, blocks[1:], strict=False)
    return all(hidden(before[2]) is after[1].first() for before, after in pairs)
