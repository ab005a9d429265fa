"""SEQ, stretched elastic quantization, for codes of few levels: ParetoQ, arXiv:2502.02631, section 4 and eq. 6.

    Q(w) = a (round(clip(w / a, -1, 1) k / 2 - 1/2) + 1/2) 2 / k     k = 4 levels: a times -3/4, -1/4, 1/4, 3/4
    Q(w) = a round(clip(w / a, -1, 1) 3 / 2) 2 / 3                   k = 3: a times -2/3, 0, 2/3

The range a is divided evenly, so that the outer levels do not lie at its ends, as they do with a learned step. Gradients are
LSQ's, clipped at the range. It starts as max|w| of the row: a range for one row or group, not for a tensor with its outliers. The
parameter is the range in units of its start (see `steps`).

Three levels are ternary codes of scale 2/3 a; four are 2 p + q times a / 4 with p and q in -1, 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.quantizers.menu.steps import whole
from qat.quantizers.record import WeightOptions

_END = 0.99
"""Of the range: at its very end half to even would round to a level that does not exist."""


@dataclass(frozen=True)
class Stretched:
    """Levels of which one is a `share` of the range, in planes with these ratios."""

    share: float
    ratios: tuple[float, ...] = (1.0,)

    def unit(self, rows: Tensor, options: WeightOptions) -> Tensor:
        """What the range starts as [R, 1], above 0."""
        return rows.abs().amax(-1, keepdim=True).clamp_min(options.eps)

    def scale(self, rows: Tensor, options: WeightOptions, clip: Tensor, unit: Tensor) -> Tensor:
        """The scale [R, 1] of the last plane."""
        return clip.abs() * unit * self.share

    def codes(self, rows: Tensor, scale: Tensor, **_: Tensor) -> Tensor:
        """Four levels as planes [2, R, L] of rows [R, L] for scales [R, 2]: 2 p + q = -3, -1, 1, 3."""
        level = 2 * (self._part(rows, scale).clamp(-_END, _END) * 2 - 0.5).round() + 1
        first = torch.where(level < 0, -1.0, 1.0)
        return torch.stack([first, level - 2 * first])

    def soft(self, rows: Tensor, scale: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
        """The four levels and the borders half way between them, for scales [R, 2]."""
        return scale.new_tensor([-3, -1, 1, 3]) * scale[:, -1:], scale.new_tensor([-2, 0, 2]) * scale[:, -1:]

    def gradient(
        self, grad: Tensor, rows: Tensor, codes: Tensor, scale: Tensor, clip: Tensor, unit: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the rows [R, L], 0 beyond the range, and of the range [R, 1], divided by sqrt(L)."""
        part, level = self._part(rows, scale), whole(codes, self.ratios) * self.share
        inside = part.abs() <= _END
        of_range = (grad * torch.where(inside, level - part, level)).sum(-1, keepdim=True)
        return grad * inside, {"clip": of_range * unit * clip.sign() / rows.shape[-1] ** 0.5}

    def _part(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Of the range."""
        return rows / scale[:, -1:] * self.share


THREE, FOUR = Stretched(2 / 3), Stretched(1 / 4, (2.0, 1.0))
