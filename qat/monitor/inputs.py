"""What the quantized inputs of layers look like: listened to in a forward pass, sums over all of a step's batches.

An absmax scale never clips; the outermost code holds at least one input of each token, and with outliers hardly another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qat import parallel
from qat.nn.bitlinear import BitLinear

OUTLIER = 6
"""Times the root mean square of its token: beyond it an input is an outlier."""
ALONE = 256.0
"""Times the root mean square of the others at which a token's largest input is counted: they are then 0 of 8 bits' codes."""

Pair = tuple[Tensor, Tensor]


class Inputs:
    """Sums over the inputs of layers, name -> statistic -> sum and count, as 0-d tensors on the layer's device."""

    def __init__(self, layers: Mapping[str, BitLinear]) -> None:
        self.layers = layers
        self.forget()

    def forget(self) -> None:
        """Begin anew, and hold no input."""
        self.sums: dict[str, dict[str, Pair]] = {}
        self._found: dict[str, Pair] = {}
        self._seen: tuple[Tensor | None, int, int | None] = (None, 0, None)

    def over_ranks(self) -> None:
        """Take in what other ranks have seen; all of them call it."""
        if parallel.size() == 1:
            return
        plain = {name: {key: (float(a), float(b)) for key, (a, b) in found.items()} for name, found in self.sums.items()}
        devices = {name: next(iter(found.values()))[0].device for name, found in self.sums.items()}
        self.sums = {}
        for other in parallel.gathered(plain):
            for name, found in other.items():
                device = devices.get(name, torch.device("cpu"))
                pairs = {key: torch.tensor(pair, dtype=torch.float64, device=device) for key, pair in found.items()}
                self._add(name, {key: (pair[0], pair[1]) for key, pair in pairs.items()})

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Add what passes within."""
        handles = self.attach()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attach(self) -> list[Any]:
        """Hooks on the layers that add what passes; whoever attached them removes them."""
        return [layer.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, layer in self.layers.items()]

    def _hook(self, name: str) -> Any:
        def hook(layer: BitLinear, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = arguments[0] if arguments else named.get("input")
            if isinstance(x, Tensor) and x.numel():
                self._add(name, self._summed(layer, x))

        return hook

    @torch.no_grad()
    def _summed(self, layer: BitLinear, x: Tensor) -> dict[str, Pair]:
        """Queries, keys and values have one input, which is looked at once."""
        own = layer.rms_norm is not None or layer.config.act_hadamard
        seen = (x, x._version, layer.config.act_bits)
        if own or not all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(seen, self._seen, strict=True)):
            self._found = input_sums(layer.met(x.detach()), layer.config.act_bits)
            self._seen = (None, 0, None) if own else seen
        return self._found

    def _add(self, name: str, found: dict[str, Pair]) -> None:
        before = self.sums.get(name)
        self.sums[name] = found if before is None else {key: _joined(key, before[key], pair) for key, pair in found.items()}


def _joined(name: str, one: Pair, other: Pair) -> Pair:
    if name == "act_absmax":
        return torch.maximum(one[0], other[0]), one[1]
    return one[0] + other[0], one[1] + other[1]


def input_sums(x: Tensor, bits: int | None) -> dict[str, Pair]:
    """Statistic -> sum and count of inputs [..., K] that are quantized token by token to that many bits; None: they are not."""
    magnitude, width = x.reshape(-1, x.shape[-1]).float().abs(), x.shape[-1]
    peak = magnitude.amax(-1, keepdim=True)
    length = torch.linalg.vector_norm(magnitude, dim=-1, keepdim=True)
    rms, others = length / width**0.5, (length.square() - peak.square()).clamp_min(0).sqrt() / max(width - 1, 1) ** 0.5
    count = torch.tensor(float(magnitude.numel()), dtype=torch.float64, device=x.device)
    tokens = torch.tensor(float(len(magnitude)), dtype=torch.float64, device=x.device)
    found = {
        "act_absmax": (peak.max().double(), torch.ones_like(count)),
        "act_peak": ((peak / others.maximum(peak / ALONE).clamp_min(1e-30)).sum(dtype=torch.float64), tokens),
        "act_outliers": ((magnitude > OUTLIER * rms).count_nonzero().double(), count),
    }
    if bits is None:
        return found
    outermost = peak * (1 - 0.5 / (2 ** (bits - 1) - 1))
    return {**found, "act_clipped": (((magnitude >= outermost) & (peak > 0)).count_nonzero().double(), count)}
