"""The layers of any decoder and its residual stream, found by what modules do in one small run and not by their names.

Layers are the children of one module (an nn.ModuleList, or several of one class) that give [B, L, H] and of which each takes what
the one before gave: the chain is what tells layers from a list of attentions or of experts. Rejected: `output_hidden_states`,
whose last one is after the final norm in most architectures and before it in others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 5
"""Of the small run; no width, so that a flattened [B * L, H] is not taken for a stream."""


@dataclass(frozen=True)
class Layers:
    """`modules` in the order of their first call; `calls` of them make up a forward, and each gives [B, L, width]."""

    modules: list[nn.Module]
    calls: int
    width: int
    written: bool
    """A later layer writes into what an earlier one gave, so that its states have to be copied."""


@dataclass
class _Call:
    name: str
    inputs: list[Tensor]
    output: Tensor
    version: int = 0
    kept: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.version, self.kept = self.output._version, self.output.clone()


def first(output: Any) -> Any:
    """A layer's hidden states, whether it gives them alone or before others, in a tuple or as transformers' ModelOutput."""
    return output if isinstance(output, Tensor) or not hasattr(output, "__getitem__") else output[0]


def with_first(output: Any, state: Tensor) -> Any:
    """The same as a layer gives it, with other hidden states."""
    if isinstance(output, Tensor):
        return state
    if isinstance(output, tuple | list):
        return type(output)([state, *output[1:]])
    if not hasattr(output, "keys"):
        return output
    found = copy.copy(output)
    found[next(iter(found.keys()))] = state
    return found


def find_layers(model: nn.Module) -> Layers:
    """The layers of a decoder.

    Raises:
        ValueError: no modules follow each other so.
    """
    calls, modules = _calls(model), dict(model.named_modules())
    found: list[list[_Call]] = []
    members: set[str] = set()
    for name, parent in modules.items():  # from the outside in: what lies within a layer is no layer
        if not any(name == one or name.startswith(f"{one}.") for one in members):
            chains = [chain for group in _groups(name, parent) if (chain := _chain(calls, group))]
            found += chains
            members |= {call.name for chain in chains for call in chain}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layers that can be told: a list of modules of which each takes the [batch, tokens,"
            " width] that the one before gave; set distill.hidden, distill.cosine and distill.relation to 0"
        )
    best = max(found, key=lambda chain: sum(p.numel() for name in _names(chain) for p in modules[name].parameters()))
    written = any(call.output._version != call.version for call in best)
    return Layers([modules[name] for name in _names(best)], len(best), best[0].output.shape[-1], written)


def _names(chain: list[_Call]) -> list[str]:
    return list(dict.fromkeys(call.name for call in chain))


def _groups(name: str, parent: nn.Module) -> Iterator[set[str]]:
    """Children that may be layers: all of a list, and those of one class where there are several."""
    children = {f"{name}.{key}".lstrip("."): child for key, child in parent.named_children()}
    if isinstance(parent, nn.ModuleList | nn.ModuleDict):
        yield set(children)
        return
    for kind in {type(child): None for child in children.values()}:
        group = {key for key, child in children.items() if type(child) is kind}
        if len(group) > 1:
            yield group


def _chain(calls: list[_Call], group: set[str]) -> list[_Call]:
    """The group's calls where each takes what the one before gave, [B, L, H] of one H; else nothing."""
    own = [call for call in calls if call.name in group]
    links = zip(own, own[1:], strict=False)
    linked = all(any(torch.equal(a.kept, x) for x in b.inputs) for a, b in links)
    return own if linked and len({call.output.shape for call in own}) == 1 else []


def _calls(model: nn.Module) -> list[_Call]:
    """Every call of a module that gives floats [1, TOKENS, H], in a run without dropout."""
    calls: list[_Call] = []
    inputs: dict[str, list[Tensor]] = {}
    handles = []

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs[name] = [x.clone() for x in (*args, *kwargs.values()) if _is_stream(x)]

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if _is_stream(state := first(output)):
                calls.append(_Call(name, inputs.get(name, []), state))

        return hook

    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(before(name), with_kwargs=True)]
        handles += [module.register_forward_hook(after(name))]
    try:
        small_run(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3 and value.shape[:2] == (1, TOKENS)


def small_run(model: nn.Module) -> None:
    """TOKENS tokens, in eval mode and without gradients."""
    tokens = torch.ones(1, TOKENS, dtype=torch.long, device=next(model.parameters()).device)
    with _evaluating(model), torch.no_grad():
        model(input_ids=tokens, use_cache=False)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within; each module's own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
