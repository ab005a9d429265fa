"""Codes and scales of a quadratic form, held against all there are, on problems small enough to try them all."""

from itertools import product

import pytest
import torch

import qat
from qat.calibration.compensation import SIZES
from qat.calibration.lattice import Lattice
from qat.calibration.solve import damped, descend, error_feedback, objective, quantized, target


def problem(n: int = 3, k: int = 6, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [n, k] and the second moment of correlated inputs."""
    mixing = torch.randn(k, k, dtype=torch.float64)
    x = torch.randn(tokens, k, dtype=torch.float64) @ mixing
    return torch.randn(n, k, dtype=torch.float64), x.T @ x / tokens


def lattice(k: int, **quant: object) -> Lattice:
    return Lattice.of(qat.QuantConfig(**quant), k)


def test_values_and_codes_are_those_of_a_layer():
    """A layer that is given the codes and scales computes with the weight that the lattice names."""
    config = qat.QuantConfig(granularity="group", group_size=4, components=2)
    grid = lattice(8, granularity="group", group_size=4, components=2)
    index, scale = torch.randint(9, (5, 8)), torch.rand(5, 2, 2, dtype=torch.float64) + 0.5
    layer = qat.BitLinear(8, 5, False, config)
    packed = qat.PackedBitLinear.from_bitlinear(layer, "2bit", (grid.codes(index), grid.stored(scale)))
    assert torch.allclose(packed.dequantize().double(), grid.weight(index, scale), atol=1e-6)


def test_target_is_the_least_squares_weight():
    weight, _ = problem()
    seen, wanted = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    second, cross = seen.T @ seen / 50, wanted.T @ seen / 50
    rows = torch.cat([seen / 50**0.5, 0.3 * torch.eye(6, dtype=torch.float64)])
    sides = torch.cat([wanted / 50**0.5, 0.3 * weight.T])
    assert torch.allclose(target(second, cross, weight, 0.09), torch.linalg.lstsq(rows, sides).solution.T)


@pytest.mark.parametrize(
    "quant", [{"granularity": "tensor"}, {"granularity": "channel"}, {"components": 2}, {"weight": "binary"}]
)
def test_each_sweep_lowers_the_error(quant):
    weight, second = problem(4, 12)
    grid = lattice(12, **quant)
    scale = grid.start(weight, qat.QuantConfig(**quant))[None]
    index = torch.randint(len(grid.digits), (1, 4, 12))
    errors = []
    for sweeps in range(5):
        found, scales = descend(weight, second, index, scale, grid, sweeps)
        errors.append(objective(weight, grid.weight(found, scales), second).sum().item())
    assert all(after <= before + 1e-12 for before, after in zip(errors, errors[1:], strict=False)) and errors[4] < 0.9 * errors[0]


def test_near_the_best_of_all_codes():
    """Of 3^6 codes a row, each with its own best scale: within a tenth of the least error, on average over problems."""
    total = least = 0.0
    for _ in range(10):
        weight, second = problem()
        grid = lattice(6, granularity="channel")
        index, scale = quantized(weight, second, grid.start(weight, qat.QuantConfig(granularity="channel")), grid, SIZES, 6)
        total += objective(weight, grid.weight(index, scale), second).sum().item()
        codes = torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=6)), dtype=torch.float64)
        fit = (codes @ second @ weight.T) / ((codes @ second) * codes).sum(1, keepdim=True).clamp_min(1e-9)
        every = fit.clamp_min(1e-5)[..., None] * codes[:, None]
        least += objective(weight, every, second).min(0).values.sum().item()
    assert least <= total <= 1.1 * least


def test_codes_of_a_ternary_weight_are_found_again():
    codes, scale = torch.randint(-1, 2, (5, 12)).double(), torch.rand(5, 1, dtype=torch.float64) + 0.5
    _, second = problem(5, 12)
    grid, config = lattice(12, granularity="channel"), qat.QuantConfig(granularity="channel")
    index, found = quantized(codes * scale, second, grid.start(codes * scale, config), grid, SIZES, 6)
    assert torch.equal(grid.codes(index), codes.to(torch.int8)) and torch.allclose(found[:, 0], scale, rtol=1e-6)


def test_error_is_fed_to_the_columns_to_come():
    """Against the plain recursion: fix one column, give the others the least-squares correction, go on (OBQ in one order)."""
    weight, second = problem(3, 6)
    grid, scale = lattice(6, granularity="channel"), torch.full((1, 3, 1, 1), 0.8, dtype=torch.float64)
    order = second.diagonal().argsort(descending=True).tolist()
    rest, free = weight.clone(), list(order)
    for i in order:
        inverse = torch.linalg.inv(second[free][:, free])
        chosen = (rest[:, i] / 0.8).round().clamp(-1, 1) * 0.8
        rest[:, free] -= ((rest[:, i] - chosen) / inverse[0, 0])[:, None] * inverse[0]
        rest[:, i] = chosen
        free = free[1:]
    assert torch.allclose(grid.weight(error_feedback(weight, second, scale, grid), scale)[0], rest)


def test_a_block_of_columns_changes_nothing(monkeypatch):
    weight, second = problem(4, 30, 90)
    grid, config = lattice(30, granularity="channel"), qat.QuantConfig(granularity="channel")
    results = []
    for block in (64, 7):
        monkeypatch.setattr("qat.calibration.solve.BLOCK", block)
        results.append(quantized(weight, damped(second, 0.01), grid.start(weight, config), grid, SIZES, 3))
    assert torch.equal(results[0][0], results[1][0]) and torch.allclose(results[0][1], results[1][1])


def test_scales_are_as_they_are_stored():
    weight, second = problem(4, 12)
    quant = {"granularity": "channel", "scale_dtype": "bfloat16"}
    grid = lattice(12, **quant)
    _, scale = quantized(weight, second, grid.start(weight, qat.QuantConfig(**quant)), grid, SIZES, 3)
    assert torch.equal(scale, scale.bfloat16().double())
