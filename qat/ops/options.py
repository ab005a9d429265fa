"""The ops' options, written once: the schemas, the reference and the kernels of every device take them in this order.

A torch.library schema knows no structures, so an op is called with its tensors and then these values, flat; who reads
them gathers them again: `o = PackedOptions(*options)`. Where options are those of two classes, the second's come first: that is
the order in which dataclasses take their bases.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from qat.config import QuantConfig
from qat.quantizers.record import Options, WeightOptions


@dataclass
class ActivationOptions(Options):
    """How activations become int8 codes; the fields of QuantConfig."""

    act_bits: int | None
    act_granularity: str
    eps: float


@dataclass
class BytesOptions(Options):
    """How packed bytes are read."""

    in_features: int
    layout: str


@dataclass
class PackedOptions(ActivationOptions, BytesOptions):
    """How packed bytes are read, and the activations that meet them. Programs on disk have this order."""


@dataclass
class TrainingOptions(ActivationOptions, WeightOptions):
    """Both quantizers of the training linear, and the precision of its backward pass."""

    backward: str


def names(options: type) -> tuple[str, ...]:
    """The options' names in their order."""
    return tuple(one.name for one in fields(options))


_WEIGHT, _TRAINING = names(WeightOptions), names(TrainingOptions)


def weight_options(c: QuantConfig | TrainingOptions) -> tuple[Any, ...]:
    """WeightOptions, flat: how a layer of this configuration quantizes its weight."""
    return tuple([getattr(c, name) for name in _WEIGHT])


def training_options(c: QuantConfig) -> tuple[Any, ...]:
    """TrainingOptions, flat: how a layer of this configuration trains."""
    return tuple([getattr(c, name) for name in _TRAINING])


_SCHEMA_TYPES = {str: "str", int: "int", float: "float", int | None: "int?"}


def schema(options: type) -> str:
    """The options as arguments of a torch.library schema: "str layout, float eps"."""
    kinds = get_type_hints(options)
    return ", ".join(f"{_SCHEMA_TYPES[kinds[name]]} {name}" for name in names(options))
