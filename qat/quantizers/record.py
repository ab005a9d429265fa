"""What a quantizer says of itself: a record that the configuration, the kernels and the formats ask, instead of its name.

Torch is not imported here, because the configuration checks itself by these records and must cost nothing to import. So a
function may be given as "module:name" and is looked up when it is first called.

A layer's weights are seen as rows [R, L] that share a scale each (a tensor is one row, a channel one, a group one), so that a
quantizer need not know of granularities:

    scale(rows, options, **parameters)                  -> [R, planes], before its rounding to `scale_dtype`; [R, 1] with `ratios`
    codes(rows, scale, **parameters)                    -> [R, L], or [planes, R, L]
    gradient(grad, rows, codes, scale, **parameters)    -> (gradient of the rows [R, L], {parameter: gradient, shaped like it})
    part(weights [n, K], scale [1, 1], mean [1, 1])     -> [n, K]
    bias(weight [N, K], codes [N, planes * K])          -> [N], differentiable in the weight
    soft(rows, scale, **parameters)                     -> (levels [R, m] in ascending order, borders [R, m - 1] between them)

`grad` is the loss's with respect to codes * scale, the weight that was multiplied; all of it is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pkgutil import resolve_name
from typing import Any

STATISTICS = ("absmean", "absmax", "absmedian")
GRANULARITIES = ("tensor", "channel", "group")
BACKWARDS = ("input", "bf16", "int8")
COMPONENT_SCALES = ("fitted", "learned")
KINDS = {"ternary": (-1, 0, 1), "binary": (-1, 1), "sparse": (-1, 0, 1)}
"""Kinds of codes that bytes can hold: what layouts and files are made for."""
PATTERNS = {"sparse": "exactly one in four neighbours is 0"}
"""What codes of a kind are beside their levels."""

Function = Callable[..., Any] | str

STATISTIC = "qat.quantizers.scales:statistic"


@cache
def resolve(function: Function) -> Callable[..., Any]:
    """The function itself, where it is given as "module:name"."""
    return resolve_name(function) if isinstance(function, str) else function


@dataclass(frozen=True)
class Parameter:
    """A value of a layer's quantizer beside its weight: `initial(rows [R, L], options)` gives it, in float32.

    It is handed to the functions as [R, planes] where each scale has one ([R, 1] where planes have `ratios`), and as [1, 1] where
    the layer has one. What is not trained is a buffer, for whoever anneals it from step to step.
    """

    initial: Function
    per: str = "scale"
    """`scale`: one a scale; `layer`: one a layer."""
    trained: bool = True

    def __post_init__(self) -> None:
        if self.per not in ("scale", "layer"):
            raise ValueError(f"per={self.per!r} is not allowed for a quantizer's parameter; choose scale or layer")


@dataclass(frozen=True, eq=False)
class Quantizer:
    """One row of the table `qat.quantizers.QUANTIZERS`; its key there is `quant.weight`."""

    levels: tuple[int, ...]
    """What a code can be, int8, in ascending order."""
    codes: Function
    scale: Function = STATISTIC
    gradient: Function | None = None
    """None: straight-through, the identity (arXiv:1308.3432)."""
    part: Function | None = None
    """Codes of some weights of a row, from the whole row's scale and mean. None: they need the whole row."""
    soft: Function | None = None
    """The levels and borders that `qat.quantizers.soft` anneals. None: these codes cannot be annealed."""
    sharpened: str = ""
    """The buffer, one a layer, that takes the same sharpness as soft codes' where the gradient is annealed and codes are hard."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    bias: Function | None = None
    """What is added to a layer's outputs beside its own bias, whatever its inputs: packed, it is a bias."""
    block: int = 1
    """Codes are taken of so many neighbours along the input at once, which must divide it."""
    packs_as: tuple[str, ...] = ()
    """The kinds of codes that these can be taken for, of `KINDS`. None: no layout and no file holds them."""
    scales: tuple[str, ...] = STATISTICS
    """Values of `quant.scale` that fit; likewise the next three."""
    granularities: tuple[str, ...] = GRANULARITIES
    act_bits: tuple[int | None, ...] = (8, 4, None)
    backwards: tuple[str, ...] = BACKWARDS
    planes: tuple[int, ...] = (1,)
    """How many matrices of codes a weight may be the sum of: values of `quant.components`, 1 where there are `ratios`."""
    ratios: tuple[float, ...] = ()
    """Where the planes are the digits of one code: plane i's scale is ratios[i] times the one that `scale` gives, the last 1."""
    sums: Mapping[str, Quantizer] = field(default_factory=dict)
    """What quantizes to more planes of these codes, where something does, by `quant.component_scales`."""
    words: str = "{weight} {scale}"
    """How it is called before people, from the configuration's keys."""
    why: str = ""
    """What makes other values of the keys above not fit, for an error message."""

    def __post_init__(self) -> None:
        """ValueError for a row that contradicts itself."""
        for kind in self.packs_as:
            if kind not in KINDS or not set(self.levels) <= set(KINDS[kind]):
                raise ValueError(f"codes {self.levels} cannot pack as {kind!r}; kinds are {KINDS}")
        if "int8" in self.backwards and not set(self.levels) <= set(KINDS["ternary"]):
            raise ValueError(f"codes {self.levels} do not fit the int8 backward pass, whose sums are of -1, 0, 1; leave it out")
        if self.ratios and (self.planes != (len(self.ratios),) or self.ratios[-1] != 1):
            raise ValueError(f"ratios {self.ratios} must end in 1 and be one for each of the planes {self.planes}")
        if self.planes != (1,) and "int8" in self.backwards:
            raise ValueError("the int8 backward pass is of one plane; leave it out")
        if {"weight", "bias"} & set(self.parameters):
            raise ValueError("a quantizer's parameter cannot be called weight or bias: the layer has those")
        if self.gradient is None and any(one.trained for one in self.parameters.values()):
            raise ValueError(f"parameters {', '.join(self.parameters)} are trained, so the quantizer needs a gradient")

    def unfit(self, kind: str) -> str | None:
        """Why bytes made for codes of that kind cannot hold these, or None where they can."""
        if kind in self.packs_as:
            return None
        if kind in PATTERNS and set(self.levels) <= set(KINDS[kind]):
            return f"of {kind} codes {PATTERNS[kind]}"
        return f"its codes are {', '.join(map(str, self.levels))}, and {kind} ones are {', '.join(map(str, KINDS[kind]))}"

    @property
    def needs(self) -> dict[str, str]:
        """What a file must have room for, of `qat.targets.ROOM`, beside codes and scales, and why."""
        planes = f"a weight is a sum of {len(self.ratios)} matrices of codes" if self.ratios else ""
        bias = "every layer gets a bias" if self.bias is not None else ""
        return {room: why for room, why in (("planes", planes), ("biases", bias)) if why}

    @property
    def statistical(self) -> bool:
        """Whether `quant.scale_multiplier` can say something: its scale is a statistic of the weights, and no more."""
        return self.scale == STATISTIC


class Options:
    """Values that an op takes one by one: `op(x, *options)`."""

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, one.name) for one in fields(self))  # type: ignore[arg-type]  # the children are dataclasses


@dataclass
class WeightOptions(Options):
    """How a latent weight becomes codes: these keys and properties of QuantConfig."""

    weight: str
    scale: str
    granularity: str
    group_size: int | None
    planes: int
    component_scales: str
    scale_dtype: str
    eps: float
    scale_multiplier: float
