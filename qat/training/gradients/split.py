"""Two optimizers that lightning sees as one: latent weights by their own (`optim.latent_optimizer`), all else by the other.

So there is one step, one clipping, one schedule and one state in checkpoints, whichever optimizers are combined. It is meant for
torch.optim.Muon (arXiv:2502.16982), which takes matrices only and is no good for embeddings, norms and scales. Rejected:
lightning's manual optimization, with which accumulation, clipping and scaling of gradients would be ours to write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

LATENT = "latent"
"""The name of the parameter group of latent weights."""

Groups = list[dict[str, Any]]


class Split(Optimizer):
    """Steps `parts` one after another. Its `param_groups` are theirs, the same dicts, so that schedules reach them."""

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        super().__init__(self._groups(), {})

    @property
    def rests(self) -> bool:
        """Whether the latent weights' moments rest beside the device."""
        return bool(getattr(self.parts[0], "rests", False))

    def _groups(self) -> Groups:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of each part, after the closure, which computes the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Those of the parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Each part its own; ValueError where it is that of another number of optimizers."""
        states = state_dict.get("parts", [])
        if len(states) != len(self.parts):
            raise ValueError(f"the checkpoint holds {max(len(states), 1)} optimizers, and this run has {len(self.parts)}")
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()  # which loading made anew


def parts_of(optimizer: Optimizer) -> list[Optimizer]:
    """Those that step: its parts, or itself."""
    return optimizer.parts if isinstance(optimizer, Split) else [optimizer]


def split(latent: Callable[[Groups], Optimizer], rest: Callable[[Groups], Optimizer]) -> Callable[[Groups], Optimizer]:
    """A factory of parameter groups: the latent weights' group goes to `latent`, the others to `rest`.

    A model without latent weights, the control, has `rest` alone.
    """

    def make(groups: Groups) -> Optimizer:
        mine = [group for group in groups if group["name"] == LATENT]
        others = [group for group in groups if group["name"] != LATENT]
        parts = [factory(own) for factory, own in ((latent, mine), (rest, others)) if own]
        return parts[0] if len(parts) == 1 else Split(parts)

    return make
