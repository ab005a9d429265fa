"""The 2-bit gather: of a sharded model's latent weights, codes and scales travel in place of floats, equal to the bit.

A step gathers every weight twice, for the forward pass and for the backward. In float32 those are 8 bytes a weight; as codes they
are half a byte, and nobody quantizes the whole weight, but each device its rows. Where a weight's quantizer does not allow that,
it travels as it is, and a line says so.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from qat.conversion.layers import bitlinears
from qat.nn.bitlinear import BitLinear
from qat.ops.options import WeightOptions, weight_options
from qat.ops.shards.latent import Place, ShardedLatent
from qat.ops.shards.serving import unfit
from qat.ops.shards.sums import local_sums, summed


def gather_codes(model: nn.Module, mesh: DeviceMesh) -> dict[str, str]:
    """Make a sharded model, of which nothing was gathered yet, gather its latent weights as codes.

    Returns:
        name -> why not, of those that must travel in float32.
    """
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    reasons = {name: _unfit(layer, users) for name, layer in bitlinears(model)}
    gathering = Gathering({name: layer for name, layer in bitlinears(model) if reasons[name] is None}, mesh.size())
    gathering.begin()
    model.register_forward_pre_hook(gathering.begin, prepend=True)  # before FSDP2's own
    return {name: why for name, why in reasons.items() if why is not None}


def words(reasons: dict[str, str], count: int) -> str:
    """A line about the layers that travel in float32, of so many."""
    kinds = Counter(reasons.values())
    why = "; ".join(f"{number} of {count} layers: {reason}" for reason, number in kinds.items())
    return f"weights that are gathered in float32, not as codes: {why}"


def _unfit(layer: BitLinear, users: Counter[int]) -> str | None:
    if users[id(layer.weight)] > 1:
        return "the weight is another module's, too"
    if layer.weight.dtype != torch.float32:
        return f"the weight is {layer.weight.dtype}"
    return unfit(WeightOptions(*weight_options(layer.config)))


class Gathering:
    """The latent weights that travel as codes."""

    def __init__(self, layers: dict[str, BitLinear], devices: int) -> None:
        self.layers = layers
        self.places = {name: Place(name, layer.config, layer.weight.shape, devices) for name, layer in layers.items()}

    @torch.no_grad()
    def begin(self, *_: Any) -> None:
        """Before a forward of the model: the scales of all weights that have one each are those of the weights as they are."""
        rows = {name: self._rows(name) for name in self.layers}
        shared = {name: place for name, place in self.places.items() if place.pooled}
        for name, place in shared.items():
            place.mine = local_sums(rows[name].detach())
        for place, sums in zip(shared.values(), summed([place.mine for place in shared.values()]), strict=True):  # type: ignore[misc]
            place.take(sums)

    def _rows(self, name: str) -> ShardedLatent:
        """This device's rows, in the parameter itself: what moves or replaces parameters may have left others there."""
        weight = self.layers[name].weight
        assert isinstance(weight, DTensor), f"{name} was gathered already when the model began"
        if not isinstance(weight._local_tensor, ShardedLatent):
            weight._local_tensor = ShardedLatent.of(weight._local_tensor, self.places[name])
        return weight._local_tensor  # type: ignore[no-any-return]
