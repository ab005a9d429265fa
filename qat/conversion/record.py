"""What a walk did, layer by layer with a reason for each one left alone; as JSON, a map that rebuilds the same layers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from qat.config import QuantConfig
from qat.conversion.overrides import layer_config
from qat.conversion.selection import is_linear
from qat.conversion.swap import as_linear, disable_fused_encoder, swap
from qat.nn.bitlinear import BitLinear
from qat.nn.packed import PackedBitLinear
from qat.quantizers.layouts import get_layout

VERSION = 1
NOT_PROBED = "not probed"


@dataclass
class Conversion:
    """What a walk changed (`converted`: module names) and what it left alone (`skipped`: name -> reason).

    As JSON it is a map that rebuilds the same layers in a fresh model: `Conversion.from_json(text).apply(model)`.
    """

    kind: str
    config: QuantConfig
    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    layout: str | None = None
    probe: dict[str, Any] | str = NOT_PROBED
    """Of a conversion with a probe: layers called and trained, `cached` (true, or why not), layers whose packed form differs."""

    def to_json(self) -> str:
        """The record as a JSON object with its version."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Conversion:
        """The inverse of `to_json`; ValueError for text that is not such a record."""
        try:
            data = json.loads(text)
            version = data.pop("version")
            if version != VERSION:
                raise ValueError(f"version {version} is not known; this qat reads version {VERSION}")
            record = cls(**{**data, "config": QuantConfig(**data["config"])})
            if not all(isinstance(name, str) for name in (*record.converted, *record.skipped, *record.skipped.values())):
                raise ValueError("converted must be a list of names, and skipped must map names to reasons")
            if record.kind not in ("bitlinear", "packed"):
                raise ValueError(f"kind={record.kind!r} is not known; allowed are bitlinear and packed")
            if record.kind == "packed":
                get_layout(str(record.layout))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a conversion record of qat: {error}") from error
        return record

    def apply(self, model: nn.Module) -> None:
        """Put empty layers of this record into a fresh, unconverted `model`, ready for its state dict.

        Raises:
            ValueError: a module that the record names is missing or is not a linear layer.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        fresh: dict[str, nn.Module] = {}
        transposed: dict[int, nn.Parameter] = {}
        for name in self.converted:
            linear = modules.get(name)
            if linear is None or not is_linear(linear):
                found = "missing" if linear is None else f"a {type(linear).__name__}"
                raise ValueError(f"the record converts {name!r}, which is {found} in this {type(model).__name__}")
            fresh[name] = self._build(linear, layer_config(self.config, name), transposed)
        swap(model, fresh)
        disable_fused_encoder(model)

    def _build(self, linear: nn.Module, config: QuantConfig, transposed: dict[int, nn.Parameter]) -> nn.Module:
        plain = as_linear(linear, transposed)
        if self.kind == "bitlinear":
            return BitLinear.from_linear(plain, config)
        bias = plain.bias is not None or config.quantizer.bias is not None
        shape, weight = (plain.in_features, plain.out_features), plain.weight
        layer = PackedBitLinear(*shape, bias, config, str(self.layout), weight.device, weight.dtype)
        return layer.train(linear.training)

    def summary(self) -> str:
        """One line a person reads: how many layers, each one skipped with its reason, and what the probe found amiss."""
        return f"{self.coverage()}{self._probe_words()}"

    def facts(self) -> dict[str, Any]:
        """For the result of a run."""
        own = {"overrides": self.config.overrides} if self.config.overrides else {}
        return {"converted": self.converted, "skipped": self.skipped, **own, "summary": self.summary(), "probe": self.probe}

    def coverage(self) -> str:
        """`summary` without the probe."""
        total = len(self.converted) + len(self.skipped)
        text = f"{len(self.converted)} of {total} linear layers converted"
        if not self.skipped:
            return text
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        parts = [f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} ({why})" for why, names in by_reason.items()]
        return f"{text}; skipped {'; '.join(parts)}"

    def _probe_words(self) -> str:
        if self.kind != "bitlinear":
            return ""
        if not isinstance(self.probe, dict):
            return f"; {self.probe}"
        unequal = self.probe["packed_unequal"]
        return f"; packed, these compute something else: {', '.join(unequal)}" if unequal else ""
