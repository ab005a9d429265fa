"""The 2-bit gather: of a sharded model's latent weights, codes and scales travel in place of floats, equal to the bit.

A step gathers every weight twice, for the forward pass and for the backward. In float32 those are 8 bytes a weight; as codes they
are half a byte, and nobody quantizes the whole weight, but each device its rows. Where a weight's quantizer does not allow that,
it travels as it is, and a line says so.

While quantization is blended in, or codes are soft, layers multiply by more than codes: those weights travel as they are, too.
Each layer says so itself before each forward of the model, so that layers, phases, validations between training steps and resumed
runs are all served by the same question, and nobody has to know of schedules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from qat.config import TrainerConfig
from qat.conversion.layers import bitlinears, unfit_layers
from qat.nn.bitlinear import BitLinear
from qat.ops.shards.latent import Place, ShardedLatent
from qat.ops.shards.sums import summed
from qat.training.strategies.buffers import gather_once, gathered_by_name


def gathering(config: TrainerConfig, mesh: DeviceMesh) -> Callable[[nn.Module], None]:
    """What settles how a sharded model's weights travel, as `trainer.gather` says; it prints what cannot travel as codes."""

    def settle(shell: nn.Module) -> None:
        reasons = gather_codes(shell, mesh) if config.gather != "float32" else {}
        if reasons:
            print(words(reasons, sum(1 for _ in bitlinears(shell))), flush=True)

    return settle


def check_gather(config: TrainerConfig, model: nn.Module) -> None:
    """Raise ValueError where codes are asked for and no layer of the converted model can send them."""
    reasons = unfit_layers(model)
    if config.gather == "codes" and all(reasons.values()):
        raise ValueError(f"trainer.gather=codes, but {words(_unfit_only(reasons), len(reasons))}; use trainer.gather=auto")


def gather_codes(model: nn.Module, mesh: DeviceMesh) -> dict[str, str]:
    """Make a sharded model, of which nothing was gathered yet, gather its latent weights as codes.

    Returns:
        name -> why not, of those that must travel in float32.
    """
    reasons = unfit_layers(model)
    if layers := {name: layer for name, layer in bitlinears(model) if reasons[name] is None}:
        gathering = Gathering(model, layers, mesh.size())
        model.register_forward_pre_hook(gathering.begin, prepend=True)  # before FSDP2's own
    return _unfit_only(reasons)


def words(reasons: dict[str, str], count: int) -> str:
    """A line about the layers that travel in float32, of so many."""
    kinds = Counter(reasons.values())
    why = "; ".join(f"{number} of {count} layers: {reason}" for reason, number in kinds.items())
    return f"weights that are gathered in float32, not as codes: {why}"


def _unfit_only(reasons: dict[str, str | None]) -> dict[str, str]:
    return {name: why for name, why in reasons.items() if why is not None}


class Gathering:
    """The latent weights that travel as codes."""

    def __init__(self, shell: nn.Module, layers: dict[str, BitLinear], devices: int) -> None:
        self.layers = layers
        self.places = {
            name: Place(name, layer.config, layer.weight.shape, devices, coded=False) for name, layer in layers.items()
        }
        for name in layers:
            self._rows(name)
        gather_once(shell)  # in floats; what `sharded` does next is a gather of codes
        self.gathered = gathered_by_name(shell)
        self._settle(dict.fromkeys(layers, True))

    def begin(self, *_: Any) -> None:
        """Before a forward of the model: what each layer needs, and the scales of all weights that have one each."""
        self._settle({name: layer.hard for name, layer in self.layers.items()})

    @torch.no_grad()
    def _settle(self, coded: dict[str, bool]) -> None:
        rows = {name: self._rows(name) for name in self.layers}
        for name, place in self.places.items():
            if place.coded != coded[name]:
                place.coded = coded[name]
                self.gathered[name].change()
        shared = {name: place for name, place in self.places.items() if place.coded and place.pooled}
        mine = [place.begin(rows[name].detach()) for name, place in shared.items()]
        for place, sums in zip(shared.values(), summed(mine), strict=True):
            place.take(sums)

    def _rows(self, name: str) -> ShardedLatent:
        """This device's rows, in the parameter itself: what moves or replaces parameters may have left others there."""
        weight = self.layers[name].weight
        assert isinstance(weight, DTensor), f"{name} was gathered already when the model began"
        if not isinstance(weight._local_tensor, ShardedLatent):
            weight._local_tensor = ShardedLatent.of(weight._local_tensor, self.places[name])
        return weight._local_tensor  # type: ignore[no-any-return]
