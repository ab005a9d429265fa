"""Hooks that keep the residual stream after each layer, before the final norm, of student and teacher.

They stay on the models from the training's first step to its last, as torch.compile traces those that it finds at its first call;
a layer that activation checkpointing computes again in the backward pass is not kept twice, as they listen in a forward only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qat.losses.layers import Layers, find_layers, first


class Tap:
    """The hooks of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: Layers = find_layers(model)
        self._states: list[Tensor] = []
        self._listens = False
        self._handles = [layer.register_forward_hook(self._keep) for layer in self.layers.modules]

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._listens:
            state = first(output)
            self._states.append(state.clone() if self.layers.written else state)

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """A list that holds the states [B, L, H] of the forward that is run within, the first layer's first."""
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


def check_alike(student: nn.Module, teacher: nn.Module, key: str) -> None:
    """Raise ValueError where layers cannot be compared one by one; `key` names the setting that asks for it."""
    mine, theirs = find_layers(student), find_layers(teacher)
    if (mine.calls, mine.width) != (theirs.calls, theirs.width):
        raise ValueError(
            f"{key} compares layer by layer, but the student has {mine.calls} layers of width {mine.width} and the teacher"
            f" {theirs.calls} of width {theirs.width}; set it to 0, or model.teacher to a model of the same layers"
        )
