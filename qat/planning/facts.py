"""What counts of a model that is to be trained: its parameters, what is gathered at once, what a sequence leaves for backward.

Saved tensors are counted by autograd's hooks in a forward pass, of a real model or of a fake one (`qat.models.weightless`): at
one sequence and at two, so that what depends on the batch (activations) parts from what does not (codes and scales).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.conversion.layers import bitlinears, unfit_layers
from qat.ops.shards.serving import row_bytes, sum_bytes


class Coded(NamedTuple):
    """A latent matrix as it travels with `trainer.gather=codes`."""

    rows: int
    row: int
    """Bytes of a row: codes and scales; floats where its quantizer allows nothing else."""
    sums: int = 0
    """Bytes that are added up over devices before."""
    floats: bool = False
    """Whether it travels as it is."""

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return self.rows * self.row


@dataclass(frozen=True)
class Weights:
    """Of one module that is gathered at once, a matrix each: (rows, columns); latent ones become codes."""

    latent: tuple[tuple[int, int], ...]
    other: tuple[tuple[int, int], ...]
    coded: tuple[Coded, ...] = ()
    """Of each latent one."""

    @property
    def count(self) -> int:
        """Parameters."""
        return sum(rows * columns for rows, columns in self.latent + self.other)

    @property
    def sent(self) -> int:
        """Bytes, gathered as codes."""
        return sum(one.bytes for one in self.coded) + 4 * sum(rows * columns for rows, columns in self.other)

    def part(self, devices: int) -> int:
        """Parameters on the first of so many devices, the fullest: ceil(rows / devices) of each matrix."""
        return sum(-(-rows // devices) * columns for rows, columns in self.latent + self.other)


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward pass leaves for the backward one."""

    fixed: int
    """Codes and scales, whatever the batch."""
    sequence: int
    """For each sequence of the batch."""


@dataclass(frozen=True)
class Facts:
    """A student as it is trained."""

    root: Weights
    """What is gathered for the whole of a pass: embedding, last norm and head."""
    blocks: tuple[Weights, ...]
    length: int
    """Tokens a sequence."""
    saved: Saved
    recomputed: Saved
    """With activation checkpointing."""
    flops: float
    """Of a forward pass, a token."""
    vocabulary: int

    @property
    def parameters(self) -> int:
        """In all."""
        return self.root.count + sum(block.count for block in self.blocks)

    @property
    def latents(self) -> int:
        """Parameters that become codes."""
        return sum(rows * columns for one in (self.root, *self.blocks) for rows, columns in one.latent)

    @property
    def largest(self) -> int:
        """Parameters of the largest matrix."""
        return max((n * k for one in (self.root, *self.blocks) for n, k in one.latent + one.other), default=0)

    def part(self, devices: int) -> int:
        """Parameters on the fullest of so many devices."""
        return self.root.part(devices) + sum(block.part(devices) for block in self.blocks)


def facts_of(
    model: nn.Module,
    units: list[str],
    sample: Mapping[str, Any],
    fake: Any = nullcontext,
    mixed: bool = False,
    only: bool | None = None,
) -> Facts:
    """Of a converted model in training mode.

    Args:
        units: names of the modules that FSDP2 gathers at once.
        sample: one sequence with its labels, int64 [1, L], as the model's arguments.
        fake: where the model runs: `qat.models.weightless.faked` for one on the meta device.
        mixed: whether matmuls are in bfloat16.
        only: whether activation checkpointing is on, where what is saved otherwise need not be known; None: both.
    """
    root, blocks, flops, vocabulary = weights_of(model, units, int(sample["input_ids"].shape[1]))
    with fake(model), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        plain = _saved(model, sample) if not only else None
        recomputed = _recomputed(model, sample) if only is not False else None
    saved = plain or recomputed or Saved(0, 0)
    return Facts(root, blocks, int(sample["input_ids"].shape[1]), saved, recomputed or saved, flops, vocabulary)


def _recomputed(model: nn.Module, sample: Mapping[str, Any]) -> Saved:
    model.activation_checkpointing_enable()  # type: ignore[operator]
    try:
        return _saved(model, sample)
    finally:
        model.activation_checkpointing_disable()  # type: ignore[operator]


def of_weights(model: nn.Module, length: int) -> Facts:
    """Of a model that is not trained, a teacher."""
    root, blocks, flops, vocabulary = weights_of(model, units_of(model), length)
    return Facts(root, blocks, length, Saved(0, 0), Saved(0, 0), flops, vocabulary)


def weights_of(model: nn.Module, units: list[str], length: int) -> tuple[Weights, tuple[Weights, ...], float, int]:
    """(root, blocks, FLOPs of a token's forward pass, vocabulary)."""
    latent, seen = _coded(model), set[int]()

    def of(module: nn.Module) -> Weights:
        mine = [p for p in module.parameters() if id(p) not in seen]
        seen.update(id(p) for p in mine)
        latents, others = ([p for p in mine if (id(p) in latent) is wanted] for wanted in (True, False))
        return Weights(tuple(map(_shape, latents)), tuple(map(_shape, others)), tuple(latent[id(p)] for p in latents))

    blocks = tuple(of(model.get_submodule(name)) for name in units)
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    return of(model), blocks, forward_flops(model, length), vocabulary


def _coded(model: nn.Module) -> dict[int, Coded]:
    """Latent weight, by its id -> how it travels as codes."""
    reasons, found = unfit_layers(model), {}
    for name, layer in bitlinears(model):
        (n, k), config = layer.weight.shape, layer.config
        plain = reasons[name] is not None
        found[id(layer.weight)] = Coded(n, 4 * k, floats=True) if plain else Coded(n, row_bytes(config, k), sum_bytes(config))
    return found


def _shape(parameter: Tensor) -> tuple[int, int]:
    """Rows, and elements of a row."""
    rows = int(parameter.shape[0]) if parameter.ndim else 1
    return rows, parameter.numel() // max(1, rows)


def units_of(model: nn.Module) -> list[str]:
    """Names of the blocks that the model's class names, which are gathered one at a time."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return [name for name, module in model.named_modules() if type(module).__name__ in kinds]


def _saved(model: nn.Module, sample: Mapping[str, Any]) -> Saved:
    one, two = (saved_bytes(model, {name: _times(value, n) for name, value in sample.items()}) for n in (1, 2))
    return Saved(max(0, 2 * one - two), two - one)


def _times(value: Any, count: int) -> Any:
    return torch.cat([value] * count) if isinstance(value, Tensor) else value


def saved_bytes(model: nn.Module, batch: Mapping[str, Any], loss: Callable[[Any], Any] = lambda output: output.loss) -> int:
    """Bytes that autograd saves for a batch, parameters left out; each storage once."""
    seen: dict[int, Any] = {p.untyped_storage()._cdata: p for p in model.parameters()}  # held, so that no address comes twice
    total = 0

    def save(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss(model(**batch))
    return total


def forward_flops(model: nn.Module, length: int) -> float:
    """Of a token in a sequence of so many: 2 for each weight that it is multiplied by, and attention to half of the others."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    looked_up = embedding.weight.numel() if head is None or head.weight is not embedding.weight else 0
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2) - looked_up
    config: Any = model.config
    attention = 2.0 * length * getattr(config, "hidden_size", 0) * getattr(config, "num_hidden_layers", 0)
    return 2.0 * matrices + attention
