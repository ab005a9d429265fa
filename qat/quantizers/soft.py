"""Soft codes: the mean of a weight's code under logistic thresholds, with its true derivative in place of a straight-through one.

A row's levels l_1 < ... < l_m meet at borders b_1 ... b_m-1, D_i = l_i+1 - l_i apart, and

    Q(w)  = l_1 + sum_i D_i sigma(beta (w - b_i) / D_i)             dQ/dw = sum_i beta sigma'(beta (w - b_i) / D_i)

Large betas are the hard codes, beta 2 is nearly a line: training sharpens it from one to the other (`qat.training.schedule`).
With t_i = tanh(beta (w - b_i) / (2 D_i)) this is Q = (l_1 + l_m) / 2 + sum_i D_i / 2 t_i and dQ/dw = sum_i beta / 4 (1 - t_i^2):
one transcendental a border, and levels that lie around 0 keep a weight of 0 there.

Sources: Hestia, arXiv:2601.20745, has a softmax over the codebook, DSQ, arXiv:1908.05033, a tanh a step. The scale is held in the
derivative, as it is by a straight-through estimate: its own way to a weight is 1 / L of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.quantizers.latent import Kernels, by_name, record_of, weight_scale
from qat.quantizers.record import WeightOptions, resolve
from qat.quantizers.scales import scale_rows


def soften(rows: Tensor, levels: Tensor, borders: Tensor, beta: Tensor | float) -> tuple[Tensor, Tensor]:
    """(Q, dQ/dw) of rows [R, L], each [R, L], for their levels [R, m] in ascending order and borders [R, m - 1].

    Levels that are equal have nothing between them: their border adds nothing to either.
    """
    apart = levels.diff(dim=1)
    there = apart > 0
    gain = beta / 2 / apart.where(there, 1.0)
    soft = ((levels[:, :1] + levels[:, -1:]) / 2).expand(rows.shape).clone()
    slope = there.sum(1, keepdim=True).to(rows.dtype).expand(rows.shape).clone()
    for i in range(borders.shape[1]):
        one = slice(i, i + 1)
        step = rows.sub(borders[:, one]).mul_(gain[:, one]).tanh_()  # in place: a pass is what a step costs
        soft.addcmul_(step, apart[:, one] / 2)
        slope.addcmul_(step, step * there[:, one], value=-1)
    return soft, slope.mul_(beta / 4)


def levels_of(
    w: Tensor, parameters: Sequence[Tensor], o: WeightOptions, kernels: Kernels | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """w as float32 [R, L], each row sharing one scale, the levels [R, m] of its rows, and their borders [R, m - 1].

    `kernels` are a device's, as for `latent.weight_scale`.

    Raises:
        ValueError: the quantizer has no soft form.
    """
    record = record_of(o)
    if record.soft is None:
        raise ValueError(f"quant.weight={o.weight} has no soft form, so it cannot be annealed")
    rows, scale, _ = weight_scale(w, o, parameters, kernels or {})
    levels, borders = resolve(record.soft)(rows, scale, **by_name(record, o, parameters))
    return rows, levels, borders


def soft_weight(
    w: Tensor, beta: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype, o: WeightOptions
) -> tuple[Tensor, Tensor]:
    """(Q, dQ/dw) of a latent weight [N, K], both [N, K] in `dtype`, for beta float32 []."""
    if w.numel() == 0:
        return w.to(dtype), w.to(dtype)
    soft, slope = soften(*levels_of(w, parameters, o), beta)
    return soft.to(dtype).reshape(w.shape), slope.to(dtype).reshape(w.shape)


def parameter_gradients(
    grad: Tensor, w: Tensor, beta: Tensor, parameters: Sequence[Tensor], o: WeightOptions
) -> list[Tensor | None]:
    """Of the quantizer's parameters, from `grad` [N, K], that of the soft weight: by way of the levels and of the borders.

    What the scale's lower bound and its dtype make of it is straight-through: a parameter that is below the bound can rise again.
    """
    record = record_of(o)
    trained = [one.trained for one in record.parameters.values()]
    if not any(trained):
        return [None] * len(parameters)
    rows, rounded, _ = weight_scale(w.detach(), o, parameters)
    with torch.enable_grad():
        given = [value.detach().requires_grad_(one) for value, one in zip(parameters, trained, strict=True)]
        named = by_name(record, o, given)
        exact = resolve(record.scale)(rows, o, **named)
        levels, borders = resolve(record.soft or "")(rows, exact + (rounded - exact).detach(), **named)
    through = level_gradients(
        scale_rows(grad.float(), o.granularity, o.group_size), rows, levels.detach(), borders.detach(), beta
    )
    ways = [(value, one) for value, one in zip((levels, borders), through, strict=True) if value.requires_grad]
    if not ways:  # none of them says anything about a soft code
        return [None] * len(parameters)
    wanted = [value for value, one in zip(given, trained, strict=True) if one]
    found = iter(torch.autograd.grad([value for value, _ in ways], wanted, [one for _, one in ways], allow_unused=True))
    return [next(found) if one else None for one in trained]


def level_gradients(grad: Tensor, rows: Tensor, levels: Tensor, borders: Tensor, beta: Tensor | float) -> tuple[Tensor, Tensor]:
    """Of levels [R, m] and borders [R, m - 1], from `grad`, that of Q, as rows [R, L].

    dQ/dD_i = t_i / 2 - beta / 4 (1 - t_i^2) (w - b_i) / D_i and dQ/db_i = -beta / 4 (1 - t_i^2): sums over a row, for as many
    borders at once as a cache holds.
    """
    apart = levels.diff(dim=1)
    there = apart > 0
    gain = beta / 2 / apart.where(there, 1.0)
    size = max(_AT_ONCE // max(rows.numel(), 1), 1)
    parts = [_sums(grad, rows, b, g) for b, g in zip(borders.split(size, 1), gain.split(size, 1), strict=True)]
    flat, bent, moved = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    of_apart = (flat / 2 - gain / 2 * moved) * there
    ends = grad.sum(1, keepdim=True) / 2
    of_levels = torch.cat([ends, torch.zeros_like(levels[:, 2:]), ends], 1)
    of_levels = of_levels + torch.nn.functional.pad(of_apart, (1, 0)) - torch.nn.functional.pad(of_apart, (0, 1))
    return of_levels, bent * there * (-beta / 4)


_AT_ONCE = 2**18
"""Weights times borders."""


def _sums(grad: Tensor, rows: Tensor, borders: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each border of a row the sums of grad t, grad (1 - t^2) and grad (1 - t^2) (w - b), each [R, borders]."""
    away = rows[:, None] - borders[:, :, None]
    step = (away * gain[:, :, None]).tanh_()
    steep = (1 - step * step).mul_(grad[:, None])
    return step.mul_(grad[:, None]).sum(-1), steep.sum(-1), steep.mul_(away).sum(-1)
