"""k ternary components: W ~ s_1 T_1 + ... + s_k T_k with each T in {-1, 0, 1}, 3^k levels a scale (k = 2: 9 in 3.2 bits).

The codes lie side by side along the input, [N, k K], and the scales likewise, [1 | N, k G]. So to every kernel such a layer is
one with k times the groups, whose input is repeated k times: nothing else changes, in training, packed or on disk.

The scales are those of least squares: each weight takes the nearest level, then the k scales of a row are fitted to the weights
by their normal equations, and so on. Fitting them one after another to what is left (greedy) has 1.3 times the error at k = 2
and twice that at k = 3. Where a row's fit ends depends on where it starts, so it starts twice and the better one is kept.

A fit of [576, 1536] takes 0.1 s on one core (k = 2, per channel) to 1 s (k = 3, groups of 64), where k = 1 takes 3 ms. Layers
with int8 activations keep its result until the weight changes; others fit at each call.

Learned scales (`quant.component_scales=learned`) are the layer's parameters, start at that fit and are never fitted again: a step
takes the nearest levels only. The gradient of the weight is straight-through, that of a scale <dQ, T_i> over its row, exact
while no code changes. The scale is the parameter's magnitude. The levels are the same for s and -s, and for any order of the
components, so a parameter may cross 0 and pass another one, and nothing is sorted or clipped to keep it from that: where a
lower bound is clipped, a parameter that was driven below it has no way back. What the bound of every scale (`quant.eps`) and
`scale_dtype` make of the magnitude is straight-through; it is the value trained with, and the one that is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.quantizers.record import WeightOptions
from qat.quantizers.scales import mean

_ROUNDS = 20
"""More lower the error by 4 % at most, and usually not at all."""
_COUNTED = 26
"""Up to that many borders, those of k = 3, one comparison with each is faster than a search."""


def scale(rows: Tensor, options: WeightOptions) -> Tensor:
    """The fitted scales [R, k] of rows [R, L], the largest first."""
    return _fit(rows, options.planes)


def codes(rows: Tensor, scale: Tensor, **_: Tensor) -> Tensor:
    """Codes int8 [k, R, L] of the levels nearest to rows [R, L], for the scales [R, k]."""
    return nearest_codes(rows, *code_book(scale))


def learned_scale(rows: Tensor, options: WeightOptions, component_scales: Tensor) -> Tensor:
    """The scales [R, k] that the parameter stands for."""
    return component_scales.abs()


def learned_gradient(
    grad: Tensor, rows: Tensor, codes: Tensor, scale: Tensor, component_scales: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of rows [R, L] the identity; of a scale <grad, T_i>, and of its parameter that with its sign."""
    of_scale = (codes * grad).sum(-1).T
    return grad, {"component_scales": torch.where(component_scales < 0, -of_scale, of_scale)}


def soft(rows: Tensor, scale: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
    """What a weight can become, [R, 3^k] in ascending order for scales [R, k], and the borders half way between, [R, 3^k - 1]."""
    values, _order = _ordered(scale)
    return values, _between(values)


def code_book(scale: Tensor) -> tuple[Tensor, Tensor]:
    """(borders [R, 3^k - 1], codes int8 [R, 3^k, k] of each level in ascending order) for scales [R, k]."""
    values, order = _ordered(scale)
    return _between(values), _digits(scale.shape[1], scale).to(torch.int8)[order]


def nearest_codes(rows: Tensor, borders: Tensor, book: Tensor) -> Tensor:
    """The codes int8 [k, R, L] of each weight's level, from `code_book`: the level's number is that of the borders below it.

    What a compiled kernel must equal to the bit: codes[i, r, l] = book[r, #{j: borders[r, j] < rows[r, l]}, i], for rows float32
    [R, L], borders float32 [R, 3^k - 1], book int8 [R, 3^k, k]; a weight on a border takes the level below. The caller wants
    them side by side, [N, k K]: of a row r of N rows of a weight in G groups, L = K / G, code l of plane i lies in row r // G at
    i K + (r % G) L + l, and per tensor, R = 1, at row l // K, i K + l % K.
    """
    if borders.shape[1] <= _COUNTED:
        number = torch.zeros(rows.shape, dtype=torch.int8, device=rows.device)
        for border in borders.unbind(1):
            number += rows > border[:, None]
        number = number.long()
    else:
        number = torch.searchsorted(borders, rows.contiguous())
    return book.permute(2, 0, 1).gather(2, number.expand(book.shape[2], -1, -1))


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


def _ordered(scale: Tensor) -> tuple[Tensor, Tensor]:
    """For scales [R, k]: the levels, ascending, and which combination each is; both [R, 3^k].

    A sum of products and no matmul, which autocast would round.
    """
    values, order = (scale[:, None] * _digits(scale.shape[1], scale)).sum(-1).sort(dim=1, stable=True)
    return values, order


def _between(levels: Tensor) -> Tensor:
    return ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()


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
    values, order = _ordered(scale)
    ends = torch.searchsorted(ordered, _between(values), right=True)
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
