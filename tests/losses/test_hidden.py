"""Losses on residual streams: values and gradients by their definitions, and weights over a run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat.config import DistillConfig
from qat.losses import LOSSES, weight_at
from qat.losses.hidden import relative
from qat.losses.logits import predicting
from qat.losses.record import Seen

LABELS = torch.tensor([[1, 2, 3, 4], [0, -100, 2, -100]])


def seen(mine: list[Tensor], theirs: list[Tensor], labels: Tensor = LABELS) -> Seen:
    targets = labels[:, 1:][predicting(labels)]
    return Seen(torch.zeros(len(targets), 7), targets, predicting(labels), None, None, None, list(zip(mine, theirs, strict=True)))


def states(layers: int = 3) -> list[Tensor]:
    return [torch.randn(2, 4, 5, dtype=torch.float32) * 10**i for i in range(layers)]


def naive(name: str, mine: list[Tensor], theirs: list[Tensor], labels: Tensor = LABELS) -> Tensor:
    total = torch.zeros(())
    for a, b in zip(mine, theirs, strict=True):
        for i in range(2):
            for j in range(3):
                if labels[i, j + 1] != -100:
                    s, t = a[i, j], b[i, j]
                    cosine = 1 - (s @ t) / (s.norm() * t.norm())
                    total = total + {"hidden": (s - t).square().sum() / t.square().sum(), "cosine": cosine}[name]
    return total / len(mine)


@pytest.mark.parametrize("labels", [LABELS, LABELS.abs()], ids=["some", "all"])
@pytest.mark.parametrize("name", ["hidden", "cosine"])
def test_value_and_gradient_against_the_definition(name: str, labels: Tensor) -> None:
    mine, theirs = states(), states()
    again = [x.clone().requires_grad_() for x in mine]
    mine = [x.requires_grad_() for x in mine]
    total, count = LOSSES[name].function(seen(mine, theirs, labels), DistillConfig())
    expected = naive(name, again, theirs, labels)
    torch.testing.assert_close(total, expected)
    assert count == int((labels[:, 1:] != -100).sum())
    (3 * total).backward()
    (3 * expected).backward()
    for a, b in zip(mine, again, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", ["hidden", "cosine"])
def test_sums_of_sequences_add_up(name: str) -> None:
    mine, theirs = states(), states()
    total, _ = LOSSES[name].function(seen(mine, theirs), DistillConfig())
    parts = [
        LOSSES[name].function(
            seen([x[i : i + 1] for x in mine], [x[i : i + 1] for x in theirs], LABELS[i : i + 1]), DistillConfig()
        )
        for i in range(2)
    ]
    assert [count for _, count in parts] == [3, 1]
    torch.testing.assert_close(parts[0][0] + parts[1][0], total)


def test_masked_positions_may_hold_anything() -> None:
    mine, theirs = states(1), states(1)
    mine[0][1, 0] = float("nan")
    mine[0].requires_grad_()
    total, _ = relative(seen(mine, theirs), DistillConfig())
    total.backward()
    assert torch.isfinite(total) and bool(torch.isfinite(mine[0].grad).all())  # type: ignore[arg-type]
    zero = torch.zeros(2, 4, 5)
    assert relative(seen([zero], [zero]), DistillConfig())[0] == 0.0


def test_bfloat16_states_are_compared_in_float32() -> None:
    theirs = [torch.full((2, 4, 5), 256.0, dtype=torch.bfloat16)]
    mine = [(theirs[0].float() * (1 + 2**-7)).bfloat16().requires_grad_()]
    total, count = relative(seen(mine, theirs), DistillConfig())
    assert total.dtype == torch.float32 and total.item() == pytest.approx(count * 2**-14)
    total.backward()
    assert mine[0].grad is not None and mine[0].grad.dtype == torch.bfloat16


def test_nothing_is_kept_but_the_states_and_norms() -> None:
    mine, theirs = [x.requires_grad_() for x in states()], states()
    known = {x.untyped_storage().data_ptr() for x in (*mine, *theirs)}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        relative(seen(mine, theirs, LABELS.abs()), DistillConfig())
    assert sum(kept.values()) <= 3 * 2 * 3 * 4 + 64  # a norm [2, 3] in float32 of each of three layers


def test_weights_fall_in_a_line_and_begin_late() -> None:
    distill = DistillConfig(kl=2.0, kl_from=0.5, hidden=4.0, hidden_until=0.8)
    assert [weight_at(distill, "hidden", step, 10) for step in (0, 2, 4, 8, 9)] == pytest.approx([4.0, 3.0, 2.0, 0.0, 0.0])
    assert [weight_at(distill, "kl", step, 10) for step in (0, 4, 5, 9)] == [0.0, 0.0, 2.0, 2.0]
    assert [weight_at(distill, "ce", step, 10) for step in (0, 9)] == [1.0, 1.0]
    falling = DistillConfig(kl=2.0, kl_until=0.5)
    assert [weight_at(falling, "kl", step, 8) for step in (0, 2, 4, 8)] == [2.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden": -1.0}, "distill.hidden=-1.0 is not allowed"),
        ({"hidden_until": 0.0}, "distill.hidden_until=0.0 is not allowed; it must be above 0"),
        ({"kl_until": 1.5}, "distill.kl_until=1.5 is not allowed; it must be at most 1"),
        ({"kl": 1.0, "kl_from": 0.5, "kl_until": 0.5}, "kl would never count"),
        ({"ce": 0.0, "kl": 1.0, "kl_from": 0.5}, "leaves steps without a loss"),
    ],
)
def test_weights_that_cannot_work_are_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DistillConfig(**values)
