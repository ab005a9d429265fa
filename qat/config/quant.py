"""The section `quant`: how a linear layer is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qat.config.checks import EPSILON, at_least, check_types, choose
from qat.quantizers import QUANTIZERS, find, planes_of, summable
from qat.quantizers.record import BACKWARDS, COMPONENT_SCALES, GRANULARITIES, STATISTICS, Quantizer

LAYER_KEYS = (
    "weight", "scale", "granularity", "group_size", "components", "component_scales", "scale_multiplier", "rms_norm_eps",
)  # fmt: skip
"""Keys in which layers of one model may differ: how their weights become codes, and whether they norm their inputs (BitDistill:
`o_proj` and `down_proj` only). All else that meets the weights is the model's."""


@dataclass
class QuantConfig:
    """How a linear layer is quantized. The default is BitNet b1.58 (arXiv:2402.17764)."""

    weight: str = "ternary"
    """`ternary` {-1, 0, 1}, `binary` {-1, 1}, or one of the menu: docs/guides/quantizers.md says what each is."""
    scale: str = "absmean"
    """What the weight scale is: `absmean`, `absmax` (codes change at half of it), `absmedian`. Binary: `absmean` only."""
    granularity: str = "tensor"
    """One scale a `tensor`, an output `channel`, or a `group` of `group_size` weights along the input."""
    group_size: int | None = None
    """Weights a group; must divide the layer's `in_features`. Only with `granularity=group`."""
    components: int = 1
    """Ternary matrices a weight is the sum of, up to 4: 2 have 9 levels in twice the bits."""
    component_scales: str = "fitted"
    """Scales of 2 or more components: `fitted` anew at every step, which is slow, or `learned` parameters that start so."""
    act_bits: int | None = 8
    """8: activations are quantized to int8. 4: to 4 bits, in floating point, without integer kernels. null: to none."""
    act_hadamard: bool = False
    """Inputs are rotated by a Hadamard matrix before they are quantized, and weights against it: outliers spread, for 4 bits."""
    act_granularity: str = "token"
    """One activation scale a `token` (last dimension) or one for the whole `tensor`."""
    scale_dtype: str = "float32"
    """The weight scale is rounded to this dtype, so that training uses the value as it will be stored."""
    eps: float = 1e-5
    """Lower bound of every scale."""
    rms_norm_eps: float | None = None
    """An RMSNorm with this epsilon for each layer's own input (SubLN). null: none. New ones make a pretrained model relearn."""
    rms_norm_start: str = "ones"
    """Weights of those norms at first: `ones`; `calibrated` on training text, so that little changes; `blended`: ones, but the
    norm is blended in over `optim.rms_norm_steps`, from none of it."""
    kernels: str = "auto"
    """`auto` takes compiled kernels where they exist, `compiled` insists on them, `reference` is pure torch."""
    backward: str = "input"
    """The backward matmuls' precision: `input` is the gradient's own; `bf16` and `int8` are faster and less exact."""
    scale_multiplier: float = 1.0
    """Times which the scale is taken: 1.25 has more zeros and larger steps. Where the scale is a statistic of the weights."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys for layers by shell patterns of their names, the last that fits wins: `{*.down_proj: {components: 2}}`."""
    budget_bits: float | None = None
    """Bits a weight, of which the layers that gain most get 2 components: 2 a component, in `base3` 1.6. null: none do."""

    def __post_init__(self) -> None:
        check_types("quant", self)
        choose("quant.weight", self.weight, tuple(QUANTIZERS))
        choose("quant.scale", self.scale, STATISTICS)
        choose("quant.granularity", self.granularity, GRANULARITIES)
        choose("quant.act_bits", self.act_bits, (8, 4, None))
        choose("quant.act_granularity", self.act_granularity, ("token", "tensor"))
        choose("quant.scale_dtype", self.scale_dtype, ("float32", "bfloat16", "float16"))
        choose("quant.kernels", self.kernels, ("auto", "compiled", "reference"))
        choose("quant.backward", self.backward, BACKWARDS)
        at_least("quant.eps", self.eps, EPSILON, most=1)
        choose("quant.components", self.components, (1, 2, 3, 4))
        choose("quant.component_scales", self.component_scales, COMPONENT_SCALES)
        at_least("quant.scale_multiplier", self.scale_multiplier, 0.01, most=100)
        at_least("quant.rms_norm_eps", self.rms_norm_eps, EPSILON, most=1)
        choose("quant.rms_norm_start", self.rms_norm_start, ("ones", "calibrated", "blended"))
        bits = "null" if self.act_bits is None else self.act_bits
        if self.act_bits != 8 and self.backward != "input":
            raise ValueError(
                f"quant.backward={self.backward} needs int8 activations (quant.act_bits=8), not quant.act_bits={bits}"
            )
        if self.act_bits != 8 and self.kernels == "compiled":
            what = "float" if self.act_bits is None else f"{bits}-bit"
            raise ValueError(f"quant.kernels=compiled needs quant.act_bits=8; {what} activations have no compiled kernels")
        if self.act_hadamard and self.budget_bits is not None:
            raise ValueError("quant.budget_bits does not fit quant.act_hadamard=true: damage is measured without rotations")
        if self.backward == "int8" and self.granularity == "group":
            raise ValueError("quant.backward=int8 does not fit quant.granularity=group; choose another granularity, or bf16")
        self._check_quantizer()
        if self.granularity == "group":
            if self.group_size is None:
                raise ValueError("quant.group_size is missing; quant.granularity=group needs it, for example 64")
            at_least("quant.group_size", self.group_size, 1)
        elif self.group_size is not None:
            raise ValueError(f"quant.group_size={self.group_size} needs quant.granularity=group, not {self.granularity}")
        at_least("quant.budget_bits", self.budget_bits, 1, most=64)
        self._check_overrides()

    def plain(self, keys: Mapping[str, Any] | None = None) -> QuantConfig:
        """With other values of these keys, and without overrides or a budget: how one layer is quantized."""
        return replace(self, **{"overrides": {}, "budget_bits": None, **(keys or {})})

    def variants(self) -> list[QuantConfig]:
        """Every plain configuration that an entry of `overrides` or a budget makes, and this one first."""
        return [quant for _, quant in self.sources()]

    def sources(self) -> list[tuple[str, QuantConfig]]:
        """The same with what makes each, for messages: "" for this one."""
        budget = [("quant.budget_bits: ", {"components": 2})] if self.budget_bits is not None else []
        overrides = [(f"quant.overrides, {pattern}: ", keys) for pattern, keys in self.overrides.items()]
        return [(what, self.plain(keys)) for what, keys in [("", {}), *overrides, *budget]]

    def check_norms(self) -> None:
        """ValueError where norms are told how to start and no layer can have one."""
        if self.rms_norm_start != "ones" and all(one.rms_norm_eps is None for one in self.variants()):
            some = "quant.rms_norm_eps, or that key of some layers in quant.overrides, for example to 1e-6"
            raise ValueError(f"quant.rms_norm_start={self.rms_norm_start} needs norms: set {some}")

    @property
    def quantizer(self) -> Quantizer:
        """The record of the table that quantizes so."""
        found = find(self.weight, self.planes, self.component_scales)
        if found is None or (found.ratios and self.components > 1):
            names = " or ".join(summable(self.components))
            what = f"quant.weight={self.weight} does not fit quant.components={self.components}"
            raise ValueError(f"{what}: components are {names}")
        return found

    @property
    def needs(self) -> dict[str, str]:
        """What a file must have room for, as `Quantizer.needs`, and for its inputs."""
        rotated = "inputs are rotated (quant.act_hadamard)" if self.act_hadamard else ""
        why = "inputs are of 4 bits (quant.act_bits=4)" if self.act_bits == 4 else rotated
        return {**self.quantizer.needs, **({"activations": why} if why else {})}

    @property
    def kernel_act_bits(self) -> int | None:
        """As the ops see it: activations of 4 bits are rounded before them, and floats to them."""
        return None if self.act_bits == 4 else self.act_bits

    @property
    def planes(self) -> int:
        """How many matrices of codes a weight is the sum of: `components`, or the digits of the quantizer's codes."""
        return planes_of(self.weight, self.components)

    @property
    def words(self) -> str:
        """How weights are quantized, for people."""
        group = f" of {self.group_size}" if self.group_size else ""
        what = self.quantizer.words.format(weight=self.weight, scale=self.scale, components=self.components)
        times = "" if self.scale_multiplier == 1 else f" times {self.scale_multiplier:g}"
        return f"{what}{times} per {self.granularity}{group}"

    def _check_overrides(self) -> None:
        for pattern, keys in self.overrides.items():
            if not isinstance(keys, dict) or not keys or not set(keys) <= set(LAYER_KEYS):
                raise ValueError(f"quant.overrides has {pattern}: {keys!r}; allowed are values for {', '.join(LAYER_KEYS)}")
            try:
                self.plain(keys)
            except ValueError as error:
                raise ValueError(f"quant.overrides, {pattern}: {error}") from error

    def _check_quantizer(self) -> None:
        """ValueError for a key whose value the quantizer's record does not allow."""
        row = self.quantizer
        what = f"quant.weight={self.weight}" if self.components == 1 else f"quant.components={self.components}"
        keys = {"scale": row.scales, "granularity": row.granularities, "act_bits": row.act_bits, "backward": row.backwards}
        for key, allowed in keys.items():
            value = getattr(self, key)
            if value not in allowed:
                only = f"only {' and '.join(map(str, allowed))} {'do' if len(allowed) > 1 else 'does'}"
                raise ValueError(f"quant.{key}={value} does not fit {what}: {row.why or only}")
        if (self.group_size or 0) % row.block:
            raise ValueError(f"quant.group_size={self.group_size} does not fit {what}: it must be a multiple of {row.block}")
        if self.scale_multiplier != 1 and not row.statistical:
            why = "its scale is no statistic of the weights, which alone can be multiplied"
            raise ValueError(f"quant.scale_multiplier={self.scale_multiplier} does not fit {what}: {why}")
