"""Hooks that keep what modules of student and teacher give in a forward: the residual stream, or an attention's projections.

They stay on the models from the training's first step to its last, as torch.compile traces those that it finds at its first call;
a layer that activation checkpointing computes again in the backward pass is not kept twice, as they listen in a forward only.
Each entry of TAPS is a thing that losses may ask for by the name of a field of `Loss` and of `Seen`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qat.config import DistillConfig
from qat.losses.layers import find_layers, first, with_first
from qat.losses.projections import find_projections

Tapped = tuple[list[nn.Module], bool]
"""Modules, and whether what they give is written into later and has to be copied."""
States = list[tuple[Tensor, Tensor]]
"""Pairs of student's and teacher's."""


class Tap:
    """The hooks of one model."""

    def __init__(self, modules: list[nn.Module], copies: bool) -> None:
        self.copies = copies
        self._states: list[Tensor] = []
        self._listens = False
        self._handles = [module.register_forward_hook(self._keep) for module in modules]

    def _keep(self, module: nn.Module, args: Any, output: Any) -> Any:
        """What follows gets the state through a node of its own, where its gradients meet before the loss's joins them: else the
        order of a sum of three would hang on what wraps the next layer, as FSDP2 does, and the last bit with it."""
        if not self._listens:
            return None
        state = first(output)
        self._states.append(state.clone() if self.copies else state)
        return with_first(output, state.view_as(state))

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """A list that holds what was given, [B, L, H] each, in the forward that is run within, in the order of calls."""
        states: list[Tensor] = []
        self._states, self._listens = states, True
        try:
            yield states
        finally:
            self._states, self._listens = [], False

    def remove(self) -> None:
        """Take the hooks away; the model is as it was."""
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class What:
    """`find` gives the modules of a model; `check` raises ValueError where student's and teacher's cannot be compared."""

    find: Callable[[nn.Module, DistillConfig], Tapped]
    check: Callable[[nn.Module, nn.Module, DistillConfig, str], None]


def _residuals(model: nn.Module, distill: DistillConfig) -> Tapped:
    found = find_layers(model)
    return found.modules, found.written


def _projections(model: nn.Module, distill: DistillConfig) -> Tapped:
    return find_projections(model, distill.relation_layer), True  # some models turn or scale queries in place


def _check_layers(student: nn.Module, teacher: nn.Module, distill: DistillConfig, key: str) -> None:
    mine, theirs = find_layers(student), find_layers(teacher)
    if (mine.calls, mine.width) != (theirs.calls, theirs.width):
        raise ValueError(
            f"{key} compares layer by layer, but the student has {mine.calls} layers of width {mine.width} and the teacher"
            f" {theirs.calls} of width {theirs.width}; set it to 0, or model.teacher to a model of the same layers"
        )


def _check_heads(student: nn.Module, teacher: nn.Module, distill: DistillConfig, key: str) -> None:
    heads = distill.relation_heads or 1
    for who, model in (("student", student), ("teacher", teacher)):
        widths = [module.weight.shape[0] for module in find_projections(model, distill.relation_layer)]  # type: ignore[index]
        if any(width % heads for width in widths):
            raise ValueError(
                f"distill.relation_heads={heads} does not divide the widths of the {who}'s queries, keys and values,"
                f" {', '.join(map(str, widths))}; {key} needs a number that does"
            )


TAPS = {"residuals": What(_residuals, _check_layers), "projections": What(_projections, _check_heads)}


class Taps:
    """The hooks of student and teacher on each of `asked`, keys of TAPS."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None, asked: list[str], distill: DistillConfig) -> None:
        models = [student] if teacher is None else [student, teacher]
        self._taps = {what: [Tap(*TAPS[what].find(model, distill)) for model in models] for what in asked}

    @contextmanager
    def listening(self, asked: set[str]) -> Iterator[dict[str, States]]:
        """A dict that holds, of the two forwards within, the pairs of each of `asked` once they are over.

        Raises:
            ValueError: one model gave more than the other, as where layers are dropped at random.
        """
        pairs: dict[str, States] = {}
        with ExitStack() as stack:
            states = {
                what: [stack.enter_context(tap.listening()) for tap in self._taps[what]] for what in self._taps if what in asked
            }
            yield pairs
        for what, (mine, theirs) in states.items():
            if len(mine) != len(theirs):
                raise ValueError(
                    f"the student gave {len(mine)} {what} in a forward and the teacher {len(theirs)}; set the model's layer"
                    " dropout to 0, or the weight of what compares them"
                )
            pairs[what] = list(zip(mine, theirs, strict=True))

    def remove(self) -> None:
        """Take all hooks away."""
        for taps in self._taps.values():
            for tap in taps:
                tap.remove()
