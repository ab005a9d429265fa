"""Codes and scales of a layer that minimise tr (W - S) H (W - S)^T over what a layer can hold: pure functions on matrices.

H [K, K] is the second moment of the layer's inputs, so the trace is the mean squared error of its outputs; S the quantized
weight.

1. `target`: the weight that serves best on inputs X_q of the quantized model, by least squares with a ridge towards W_0.
2. `error_feedback`: codes column by column, each column's error spread over those to come (GPTQ, arXiv:2210.17323: OBQ in one
   order for all rows, through a Cholesky factor of the inverse), for several sizes of the scales at once.
3. `descend`: coordinate descent on codes and scales. Each step solves for one coordinate exactly, so the error never rises.

Every loop over columns works on all rows and all candidates [B, N, K] at once; what lies outside a block of columns is updated by
one matmul a block. All in float64: at two bits the later columns carry errors many times their own size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.calibration.lattice import Lattice, nearest

BLOCK = 64


def damped(second: Tensor, ridge: float) -> Tensor:
    """H + ridge, [K, K]."""
    return second + ridge * torch.eye(len(second), dtype=second.dtype, device=second.device)


def target(second: Tensor, cross: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """argmin over W of |X_q W^T - Y|^2 / n + ridge |W - weight|^2, float64 [N, K].

    Args:
        second: X_q^T X_q / n, float64 [K, K].
        cross: Y^T X_q / n, float64 [N, K], of what the layer should give.
        weight: where it stays as far as the inputs do not tell, [N, K].
        ridge: above 0, which makes the equations definite.
    """
    factor = torch.linalg.cholesky(damped(second, ridge))
    return torch.cholesky_solve((cross + ridge * weight.double()).T, factor).T


def objective(weight: Tensor, quantized: Tensor, second: Tensor) -> Tensor:
    """The error of each row, [..., N]."""
    difference = quantized - weight
    return ((difference @ second) * difference).sum(-1)


def error_feedback(weight: Tensor, second: Tensor, scale: Tensor, lattice: Lattice) -> Tensor:
    """The digits' indices [B, N, K] of weight [N, K] for scales [B, R, G, P]; `second` must be positive definite."""
    order = second.diagonal().argsort(descending=True, stable=True)
    group = (order // (len(order) // lattice.groups)).tolist()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    values, rest = lattice.values(scale), weight[:, order].repeat(len(scale), 1, 1)
    index = torch.empty_like(rest, dtype=torch.int64)
    for start in range(0, len(order), BLOCK):
        end = min(start + BLOCK, len(order))
        errors = torch.empty_like(rest[..., start:end])
        for i in range(start, end):
            index[..., i], chosen = nearest(rest[..., i], values[..., group[i], :])
            error = (rest[..., i] - chosen) / upper[i, i]
            rest[..., i:end] -= error[..., None] * upper[i, i:end]
            errors[..., i - start] = error
        rest[..., end:] -= errors @ upper[start:end, end:]
    return index[..., order.argsort()]


def descend(
    weight: Tensor, second: Tensor, index: Tensor, scale: Tensor, lattice: Lattice, sweeps: int, *, scales: bool = True
) -> tuple[Tensor, Tensor]:
    """Indices [B, N, K] and scales [B, R, G, P] after `sweeps` over the codes, each followed by one over the scales.

    Without `scales` these stay as they are: for the last sweep, after they were rounded to what is stored.
    """
    slope = (lattice.weight(index, scale) - weight) @ second
    for _ in range(sweeps):
        index, slope = _sweep_codes(second, index, scale, lattice, slope)
        if scales:
            scale, slope = _sweep_scales(second, index, scale, lattice, slope)
    return index, scale


def _sweep_codes(second: Tensor, index: Tensor, scale: Tensor, lattice: Lattice, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Each code the nearest to the bottom of its parabola."""
    index, slope, values = index.clone(), slope.clone(), lattice.values(scale)
    width, now = index.shape[-1] // lattice.groups, lattice.weight(index, scale)
    curvature = second.diagonal().clamp_min(torch.finfo(second.dtype).tiny)
    for start in range(0, index.shape[-1], BLOCK):
        end = min(start + BLOCK, index.shape[-1])
        before, inner = now[..., start:end].clone(), slope[..., start:end].clone()
        for i in range(start, end):
            bottom = now[..., i] - inner[..., i - start] / curvature[i]
            index[..., i], chosen = nearest(bottom, values[..., i // width, :])
            inner += (chosen - now[..., i])[..., None] * second[i, start:end]
            now[..., i] = chosen
        slope += (now[..., start:end] - before) @ second[start:end]
    return index, slope


def _sweep_scales(second: Tensor, index: Tensor, scale: Tensor, lattice: Lattice, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Each scale at the bottom of its parabola, or at its lower bound."""
    scale, slope = scale.clone(), slope.clone()
    width = index.shape[-1] // lattice.groups
    for group in range(lattice.groups):
        part = slice(group * width, (group + 1) * width)
        for plane in range(scale.shape[-1]):
            codes = lattice.digits[:, plane][index[..., part]]
            spread = codes @ second[part]
            push, curvature = (slope[..., part] * codes).sum(-1), (spread[..., part] * codes).sum(-1)
            if lattice.tied:
                push, curvature = push.sum(-1, keepdim=True), curvature.sum(-1, keepdim=True)
            old = scale[..., group, plane].clone()
            new = torch.where(curvature > 0, old - push / curvature, old).clamp_min(lattice.least)
            scale[..., group, plane] = new
            slope += (new - old)[..., None] * spread
    return scale, slope


def quantized(
    weight: Tensor, second: Tensor, start: Tensor, lattice: Lattice, sizes: Sequence[float], sweeps: int
) -> tuple[Tensor, Tensor]:
    """Indices [N, K] and scales [R, G, P] for `weight` [N, K], from the best of `sizes` times the scales `start` [R, G, P]."""
    scale = torch.tensor(sizes, dtype=torch.float64, device=weight.device)[:, None, None, None] * start
    index = error_feedback(weight, second, scale, lattice)
    index, scale = descend(weight, second, index, scale, lattice, sweeps)
    error = objective(weight, lattice.weight(index, scale), second)
    best = error.sum(-1, keepdim=True).argmin(0) if lattice.tied else error.argmin(0)
    index, scale = _chosen(index, best), lattice.rounded(_chosen(scale, best))
    index, _ = descend(weight, second, index, scale, lattice, 1, scales=False)
    return index[0], scale[0]


def _chosen(candidates: Tensor, best: Tensor) -> Tensor:
    """Of candidates [B, N, ...] those of the indices `best` [N | 1], as [1, N, ...]."""
    where = best.view(1, -1, *[1] * (candidates.ndim - 2)).expand(1, *candidates.shape[1:])
    return candidates.gather(0, where)
