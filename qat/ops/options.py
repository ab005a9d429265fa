"""The ops' options, written once: the schemas, the reference and the kernels of every device take them in this order.

A torch.library schema knows no structures, so an op is called with its tensors and then these values, flat; who reads
them gathers them again: `o = PackedOptions(*options)`.
"""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

from qat.config import QuantConfig


class ActivationOptions(NamedTuple):
    """How activations become int8 codes."""

    granularity: str
    eps: float


class WeightOptions(NamedTuple):
    """How a latent weight becomes codes; the fields of QuantConfig."""

    scheme: str
    scale: str
    granularity: str
    group_size: int | None
    scale_dtype: str
    eps: float
    components: int

    @property
    def scaling(self) -> tuple[str, str, int | None, str, float]:
        """What `quantizers.weight_scale` takes after w."""
        return self.scale, self.granularity, self.group_size, self.scale_dtype, self.eps


class PackedOptions(NamedTuple):
    """How packed bytes are read, and the activations that meet them."""

    in_features: int
    layout: str
    act_bits: int | None
    act_granularity: str
    eps: float


class TrainingOptions(NamedTuple):
    """Both quantizers of the training linear, and the precision of its backward pass."""

    scheme: str
    scale: str
    granularity: str
    group_size: int | None
    scale_dtype: str
    act_bits: int | None
    act_granularity: str
    eps: float
    components: int
    backward: str

    @property
    def weight(self) -> WeightOptions:
        """The weight's part."""
        return WeightOptions(
            self.scheme, self.scale, self.granularity, self.group_size, self.scale_dtype, self.eps, self.components
        )


def weight_options(c: QuantConfig) -> WeightOptions:
    """How a layer of this configuration quantizes its weight."""
    return WeightOptions(c.weight, c.scale, c.granularity, c.group_size, c.scale_dtype, c.eps, c.components)


def training_options(c: QuantConfig) -> TrainingOptions:
    """How a layer of this configuration trains."""
    return TrainingOptions(
        *(c.weight, c.scale, c.granularity, c.group_size, c.scale_dtype),
        *(c.act_bits, c.act_granularity, c.eps, c.components, c.backward),
    )


_SCHEMA_TYPES = {str: "str", int: "int", float: "float", int | None: "int?"}


def schema(options: type) -> str:
    """The options as arguments of a torch.library schema: "str granularity, float eps"."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(options).items())
