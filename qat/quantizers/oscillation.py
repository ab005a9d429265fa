"""Latent weights that swing across a border of their cell, from step to step: damped, or frozen (Nagel et al., arXiv:2203.11086).

A straight-through gradient pushes a weight over a border whenever the loss wants a value between two codes, and back again. Such
a weight never settles, and what is packed is the side where the last step happened to leave it.

Damping adds d |Q(W) - clip(W, low, high)|^2 to the loss, Q(W) held, low and high the outermost levels: weights are pulled to the
middle of their cell, the harder the nearer they are to a border. Freezing counts: a code that changes against the direction of
its last change oscillates, f <- (1 - m) f + m [oscillates], and where f is above a threshold the weight takes the level nearest
to the running mean of its quantized values and stays there.

What is held is the latent value, not the code: were it code times scale, a scale that is a statistic of the weights would shrink
with each step. A frozen code can so move only if its scale moves by half a level.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qat.quantizers.components import sum_components
from qat.quantizers.scales import dequantize_weight

MOMENTUM = 0.01
"""m, the paper's: a code that oscillates at every look is above a threshold of .02 after two."""


def damping_gradient(weight: Tensor, codes: Tensor, scale: Tensor, planes: int) -> Tensor:
    """Of |Q(W) - clip(W, low, high)|^2 with Q(W) held: 2 (W - Q(W)) where low <= W <= high, else 0; float32 [N, K].

    The outermost levels are those that some weight of the layer has, seen as shares of its largest possible one: grids of whole
    numbers need not be as wide below 0 as above.

    Args:
        weight: [N, K]; codes int8 [N, planes * K] and scale float32 [1 | N, planes * G] are what it quantizes to.
    """
    weight = weight.detach().float()
    levels, largest = _values(codes, scale, planes), _values(torch.ones_like(codes), scale, planes)
    low, high = (levels / largest).aminmax()
    inside = (weight >= low * largest) & (weight <= high * largest)
    return torch.where(inside, 2 * (weight - levels), 0.0)


def _values(codes: Tensor, scale: Tensor, planes: int) -> Tensor:
    return sum_components(dequantize_weight(codes, scale), planes)


@dataclass
class Trace:
    """What is remembered of a layer's weights [N, K]: 11 bytes each, and a byte for each further plane of codes."""

    codes: Tensor
    """int8 [N, planes * K], at the last look."""
    direction: Tensor
    """int8, of the last change: 1 up, -1 down, 0 none so far."""
    frequency: Tensor
    """float32, f."""
    mean: Tensor
    """float32, the running mean of Q(W); of a frozen weight the latent value that it keeps."""
    frozen: Tensor
    """bool."""

    @classmethod
    def begun(cls, codes: Tensor, scale: Tensor, planes: int) -> Trace:
        """That of weights which have not changed yet."""
        mean = _values(codes, scale, planes)
        none = torch.zeros_like(mean)
        return cls(codes.clone(), none.to(torch.int8), none, mean, none.bool())

    def look(self, codes: Tensor, scale: Tensor, planes: int, threshold: float) -> Tensor:
        """Count what has changed since the last look; bool [N, K], which weights are to be frozen now."""
        values, before = _values(codes, scale, planes), _values(self.codes, scale, planes)
        direction = (values - before).sign().to(torch.int8)
        back = (direction != 0) & (direction == -self.direction)
        self.frequency.lerp_(back.float(), MOMENTUM)
        self.direction = torch.where(direction != 0, direction, self.direction)
        self.mean = torch.where(self.frozen, self.mean, self.mean.lerp(values, MOMENTUM))
        self.codes = codes.clone()
        return (self.frequency > threshold) & ~self.frozen

    def freeze(self, chosen: Tensor, values: Tensor) -> None:
        """Keep these weights at those latent values from now on."""
        self.mean, self.frozen = torch.where(chosen, values.float(), self.mean), self.frozen | chosen

    def held(self, weight: Tensor) -> Tensor:
        """The weight, with frozen ones at what they keep."""
        return torch.where(self.frozen, self.mean.to(weight.dtype), weight)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; `Trace(**state)` is it again."""
        return asdict(self)

    def to(self, device: torch.device) -> Trace:
        """The same there."""
        return Trace(**{name: value.to(device) for name, value in vars(self).items()})
