"""Widen an MLP exactly, for formats that hold only multiples of some width.

Zero rows in gate / up, zero columns in down, `intermediate_size` raised: the new units are act(0) * 0 = 0, so neither the sum nor
the largest activation changes, and scales are those from before. A norm in between would change: nothing is padded where down
has one of its own, and one of the architecture makes the shapes differ from the raised config; the caller refuses both. Hidden
widths cannot be padded at all.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_MLPS = (  # layers whose rows, and the layer whose columns, are the intermediate units
    (("gate_proj", "up_proj"), "down_proj"),
    (("fc1",), "fc2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)


@dataclass(frozen=True)
class Padding:
    """Units added to every MLP, and the names of the layers that grow rows or columns for it."""

    before: int = 0
    after: int = 0
    rows: frozenset[str] = field(default_factory=frozenset)
    columns: frozenset[str] = field(default_factory=frozenset)

    @property
    def added(self) -> int:
        """New units an MLP."""
        return self.after - self.before

    def grow(self, name: str, weight: Tensor) -> Tensor:
        """The weight (or codes) [N, K] of layer `name` with its zero rows and columns."""
        columns, rows = (self.added if name in names else 0 for names in (self.columns, self.rows))
        return F.pad(weight, (0, columns, 0, rows)) if rows or columns else weight

    def grow_bias(self, name: str, bias: Tensor) -> Tensor:
        """The bias [N] of layer `name` with its zero rows."""
        return F.pad(bias, (0, self.added)) if name in self.rows else bias

    def raise_config(self, config: Any) -> Any:
        """A copy of the transformers config with the new width."""
        config = copy.deepcopy(config)
        if self.added:
            config.get_text_config().intermediate_size = self.after
        return config

    def note(self) -> str:
        """One sentence for the model card."""
        return (
            f"The MLP width was padded from {self.before} to {self.after} with zero weights, because the format needs a multiple:"
            " the outputs are the same."
        )


def plan(model: nn.Module, config: Any, multiple: int) -> Padding:
    """How to widen the MLPs of `model` to a multiple; no padding where none is needed or possible."""
    width = getattr(config.get_text_config(), "intermediate_size", None)
    if not isinstance(width, int) or width % multiple == 0:
        return Padding()
    rows: set[str] = set()
    columns: set[str] = set()
    for name, module in model.named_modules():
        for inner, outer in _MLPS:
            if _is_mlp(module, inner, outer, width) and (len(inner) > 1 or _zero_at_zero(config.get_text_config())):
                prefix = f"{name}." if name else ""
                rows.update(prefix + leaf for leaf in inner)
                columns.add(prefix + outer)
    if not rows:
        return Padding()
    return Padding(width, -(-width // multiple) * multiple, frozenset(rows), frozenset(columns))


def _is_mlp(module: nn.Module, inner: tuple[str, ...], outer: str, width: int) -> bool:
    found = [getattr(module, leaf, None) for leaf in inner]
    down = getattr(module, outer, None)
    if getattr(down, "rms_norm", None) is not None:
        return False
    return getattr(down, "in_features", None) == width and all(getattr(layer, "out_features", None) == width for layer in found)


def _zero_at_zero(config: Any) -> bool:
    """Whether the activation of an MLP without a gate maps 0 to 0."""
    import torch
    from transformers.activations import ACT2FN

    name = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    return name in ACT2FN and float(ACT2FN[name](torch.zeros(1))) == 0.0
