"""k ternary components: W ~ s_1 T_1 + ... + s_k T_k with each T in {-1, 0, 1}, 3^k levels a scale (k = 2: 9 in 3.2 bits).

The codes lie side by side along the input, [N, k K], and the scales likewise, [1 | N, k G]. So to every kernel such a layer is
one with k times the groups, whose input is repeated k times: nothing else changes, in training, packed or on disk.

The scales are those of least squares: each weight takes the nearest level, then the k scales of a row are fitted to the weights
by their normal equations, and so on. Fitting them one after another to what is left (greedy) has 1.3 times the error at k = 2
and twice that at k = 3. Where a row's fit ends depends on where it starts, so it starts twice and the better one is kept.

A fit of [576, 1536] takes 0.1 s on one core (k = 2, per channel) to 1 s (k = 3, groups of 64), where k = 1 takes 3 ms. Layers
with int8 activations keep its result until the weight changes; others fit at each call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.quantizers.record import WeightOptions
from qat.quantizers.scales import mean

_ROUNDS = 20
"""More lower the error by 4 % at most, and usually not at all."""


def scale(rows: Tensor, options: WeightOptions) -> Tensor:
    """The fitted scales [R, k] of rows [R, L], the largest first."""
    return _fit(rows, options.planes)


def codes(rows: Tensor, scale: Tensor) -> Tensor:
    """Codes [k, R, L] of the levels nearest to rows [R, L], for the scales [R, k]."""
    return torch.stack(_nearest(rows, scale))


def soft(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The 3^k levels of scales [R, k] in ascending order, and the borders half way between them."""
    order, borders = _levels(scale)
    return (scale[:, None] * _digits(scale.shape[1], scale)).sum(-1).gather(1, order), borders


def sum_components(values: Tensor, components: int) -> Tensor:
    """[..., components * K] -> [..., K]: what a dequantized weight [N, components * K] stands for."""
    return values.unflatten(-1, (components, -1)).sum(-2) if components > 1 else values


def repeat(x: Tensor, components: int) -> Tensor:
    """[..., K] -> [..., components * K], the input that meets the codes."""
    return x.repeat(*[1] * (x.ndim - 1), components) if components > 1 else x


def _digits(components: int, like: Tensor) -> Tensor:
    """Every combination of codes, [3^k, k]."""
    combination = torch.arange(3**components, device=like.device)[:, None]
    place = 3 ** torch.arange(components - 1, -1, -1, device=like.device)
    return (combination // place % 3 - 1).to(like.dtype)


def _levels(scale: Tensor) -> tuple[Tensor, Tensor]:
    """For scales [R, k]: which combination each level is, in the levels' order [R, 3^k], and their borders [R, 3^k - 1].

    A sum of products and no matmul, which autocast would round.
    """
    levels, order = (scale[:, None] * _digits(scale.shape[1], scale)).sum(-1).sort(dim=1, stable=True)
    return order, ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()


def _nearest(rows: Tensor, scale: Tensor) -> list[Tensor]:
    """For each of the k scales [R, k] the codes int8 [R, L] of the weights' nearest levels."""
    order, borders = _levels(scale)
    combination = order.gather(1, torch.searchsorted(borders, rows.contiguous()))
    return [plane[combination] for plane in _digits(scale.shape[1], scale).to(torch.int8).T]


def _fit(rows: Tensor, components: int) -> Tensor:
    """The scales [R, k] of rows [R, L].

    Rows are sorted once, and their sums up to each place kept in float64: the weights between two borders are then two look-ups.
    """
    ordered = rows.sort(1).values
    sums = torch.nn.functional.pad(ordered.double().cumsum(1), (1, 0))
    starts = [_spread(rows, components), _greedy(rows, components)]
    fits = [_alternate(ordered, sums, start) for start in starts]
    better = fits[0][1] <= fits[1][1]
    return torch.where(better[:, None], fits[0][0], fits[1][0])


def _spread(rows: Tensor, components: int) -> Tensor:
    """Evenly spaced levels up to the largest weight: balanced ternary digits."""
    steps = 3.0 ** torch.arange(components - 1, -1, -1, device=rows.device)
    return rows.abs().amax(1, keepdim=True) / (3**components // 2) * steps


def _greedy(rows: Tensor, components: int) -> Tensor:
    """One after another: absmean codes of what is left, and their least-squares scale."""
    rest, scales = rows, []
    for _ in range(components):
        codes = (rest / mean(rest.abs()).clamp_min(torch.finfo(rows.dtype).tiny)).round().clamp(-1, 1)
        total = (rest * codes).sum(1, keepdim=True, dtype=torch.float64).float()
        scales.append(total / codes.abs().sum(1, keepdim=True).clamp_min(1))
        rest = rest - scales[-1] * codes
    return torch.cat(scales, 1)


def _alternate(ordered: Tensor, sums: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(scales [R, k] after the rounds, their squared error [R] up to a constant)."""
    for _ in range(_ROUNDS):
        normal, target = _normal_equations(ordered, sums, scale)
        scale = _solve(normal, target).abs().sort(1, descending=True).values.to(scale.dtype)
    normal, target = _normal_equations(ordered, sums, scale)
    wide = scale.double()
    return scale, ((normal @ wide[..., None])[..., 0] * wide).sum(1) - 2 * (wide * target).sum(1)


def _normal_equations(ordered: Tensor, sums: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(T^T T [R, k, k], T^T w [R, k]) in float64 for the codes T of the nearest levels."""
    order, borders = _levels(scale)
    ends = torch.searchsorted(ordered, borders, right=True)
    ends = torch.cat([torch.zeros_like(ends[:, :1]), ends, torch.full_like(ends[:, :1], ordered.shape[1])], 1)
    count, total = ends.diff(dim=1).double(), sums.gather(1, ends).diff(dim=1)
    count, total = (torch.zeros_like(cells).scatter(1, order, cells) for cells in (count, total))
    codes = _digits(scale.shape[1], sums)
    products = codes[:, :, None] * codes[:, None]
    return (count @ products.flatten(1)).unflatten(1, products.shape[1:]), total @ codes


def _solve(normal: Tensor, target: Tensor) -> Tensor:
    """Gauss and Jordan without pivots, all rows at once: the matrices are small, symmetric and positive definite.

    A component that no weight uses would leave the equations singular: a small ridge makes its scale 0.
    """
    ridge = normal.diagonal(dim1=1, dim2=2).amax(1)[:, None, None].clamp_min(1) * 1e-12
    eye = torch.eye(normal.shape[1], dtype=normal.dtype, device=normal.device)
    system = torch.cat([normal + ridge * eye, target[..., None]], 2)
    for i in range(normal.shape[1]):
        row = system[:, i] / system[:, i, i, None]
        system = system - system[:, :, i, None] * row[:, None]
        system[:, i] = row
    return system[..., -1]
