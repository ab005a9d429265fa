"""Blended quantization and soft codes need floats: those layers gather them, at that time, and codes travel before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices.pair import Pair
from devices.test_gather import Sent, made
from devices.test_sharding import model, tokens, trained
from torch import Tensor, nn

from qat.conversion.layers import bitlinears, set_beta, set_lambda
from qat.ops.shards.gathered import GatheredCodes
from qat.parallel import rank
from qat.training.strategies.sharding import collect

Prepare = Callable[[nn.Module], None]


class Phases:
    """Of three steps the first is blended, or soft, then codes; each after a validation of codes in inference mode."""

    def __init__(self, begin: Prepare, end: Prepare) -> None:
        self.begin, self.end, self.step = begin, end, 0

    def __call__(self, of: nn.Module) -> None:
        self.end(of)
        with torch.inference_mode():
            of.eval()
            of(tokens(9, 0))
            of.train()
        if self.step in (0, 2):
            self.begin(of)
        self.step += 1


def blend(of: nn.Module) -> None:
    set_lambda(of, 0.5)


def blend_one(of: nn.Module) -> None:
    """As `optim.lambda_schedule=layerwise` does."""
    next(layer for _, layer in bitlinears(of)).set_lambda(0.5)


def whole(of: nn.Module) -> None:
    set_lambda(of, 1.0)


def soften(of: nn.Module) -> None:
    set_beta(of, 3.0)


def harden(of: nn.Module) -> None:
    set_beta(of, None)


def softened_and_validated(of: nn.Module) -> None:
    """As after `set_beta` without a reset: soft codes are of training mode alone."""
    set_beta(of, 3.0)


PHASES: dict[str, tuple[Prepare, Prepare, list[int]]] = {
    "blended": (blend, whole, [0, 14, 0]),
    "a layer blended": (blend_one, whole, [13, 14, 13]),
    "soft": (soften, harden, [0, 14, 0]),
    "soft, not reset for a validation": (soften, softened_and_validated, [0, 0, 0]),
}


def on_ranks(quant: dict[str, Any], phases: str) -> tuple[dict[str, Tensor], list[int]]:
    """The state after training, and how many layers had codes in each training step."""
    original, shell = made(quant)
    seen: list[int] = []
    for _, layer in bitlinears(shell):
        layer.register_forward_pre_hook(lambda layer, _: seen.append(isinstance(layer.weight.data, GatheredCodes)))
    trained(shell, lambda step: [tokens(step, rank())], Phases(*PHASES[phases][:2]))
    collect(shell, original)
    assert all(seen[28 * i : 28 * i + 14] == [True] * 14 for i in range(3))  # in validations
    return original.state_dict(), [sum(seen[28 * i + 14 : 28 * i + 28]) for i in range(3)]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("phases", PHASES)
def test_phases_train_as_on_one_process(pair: Pair, phases: str, granularity: str) -> None:
    quant, alone = {"granularity": granularity}, model({"granularity": granularity})
    trained(alone, lambda step: [tokens(step, 0), tokens(step, 1)], Phases(*PHASES[phases][:2]))
    for found, coded in pair(on_ranks, quant, phases, seconds=240):
        assert coded == PHASES[phases][2]
        for name, value in alone.state_dict().items():
            assert torch.equal(found[name], value), name


def sent() -> list[int]:
    """Bytes gathered by a forward with codes, blended, and with codes again."""
    _, shell = made({})
    found = []
    for lam in (1.0, 0.5, 1.0):
        set_lambda(shell, lam)
        with Sent() as counted:
            shell(tokens(0, rank()))
        found.append(counted.bytes["gather"])
    return found


def test_no_phase_sends_what_another_needs(pair: Pair) -> None:
    latent = sum(layer.weight.numel() for _, layer in bitlinears(model({})))
    for codes, floats, again in pair(sent):
        assert codes == again and floats - codes == latent * 15 // 16 * 4 // 2  # a rank sends its half
