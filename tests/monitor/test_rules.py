"""Each alarm on a series that provokes it, and beside it on one that must not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qat.monitor.rules import RULES, Facts, Finding, History, findings

FACTS = Facts(steps=1000, weights=lambda step: {"ce": 0.5, "kl": 0.5})


def series(name: str, values: Sequence[float], every: int = 10, **more: float) -> list[dict[str, float]]:
    return [{"step": (i + 1) * every, name: value, **more} for i, value in enumerate(values)]


def look(step: int, family: str = "q", **values: float) -> dict[str, float]:
    named = {f"quant/{family}/{name}": value for name, value in values.items()}
    return {"step": step, "quant/flip_rate": 0.1, "quant/v/zero_fraction": 0.3, "quant/v/flip_rate": 0.1, **named}


def raised(kind: str, rows: list[Any], facts: Facts = FACTS, **more: Any) -> list[Finding]:
    found = findings(History(rows, facts, **more))
    assert {place[0] for place in found} <= {kind}, "another alarm than was provoked"
    return list(found.values())


NOISE = [2.0 + 0.3 * (i % 3) for i in range(60)]
RISING = [*NOISE, *(2.5 + 0.2 * i for i in range(12))]
SPIKES = [5.5 if i in (30, 40, 50) else value for i, value in enumerate(NOISE)]
HELD_OUT = {"step": 300, "val/ce": 2.0, "val/full_precision_ce": 1.9, "val/teacher_ce": 1.9, "val/gap": 0.1}
NORMS = {"optim/grad_norm/ce": 1.0, "optim/grad_norm/kl": 99.0}
FLAT = [*series("train/ce", NOISE), look(600), *({**HELD_OUT, "step": step, "val/gap": 0.9} for step in (400, 600))]


def test_codes_that_are_held_are_not_frozen() -> None:
    rows = [look(step, flip_rate=0.0 if step > 100 else 0.01) for step in range(50, 450, 50)]
    assert raised("codes_frozen", rows) and not raised("codes_frozen", rows, replace(FACTS, held=100))


@pytest.mark.parametrize(
    ("kind", "bad", "good", "where", "key"),
    [
        ("divergence", series("train/ce", RISING), series("train/ce", RISING[:64]), "", "optim.lr=0.0003"),
        ("divergence", series("train/ce", [60.0] * 5), series("train/ce", [40.0] * 5), "", "optim.lr=0.0003"),
        ("zero_collapse", [look(50, zero_fraction=0.99)], [look(50, zero_fraction=0.9)], "q", "optim.weight_decay=0"),
        (
            "codes_frozen",
            [look(step, flip_rate=0.0) for step in (50, 100, 150)],
            [look(step, flip_rate=0.0 if step > 50 else 0.01) for step in (50, 100, 150)],
            "q",
            "optim.latent_lr_multiplier=4",
        ),
        (
            "oscillation",
            [{**look(step), "quant/oscillating": 0.4} for step in (850, 900, 950, 1000)],
            [{**look(step), "quant/oscillating": 0.4 if step < 1000 else 0.1} for step in (850, 900, 950, 1000)],
            "",
            "optim.freeze_oscillation=0.02",
        ),
        ("scale_collapse", [look(50, scale_drift=-0.95)], [look(50, scale_drift=-0.5)], "q", "optim.lr=0.0003"),
        ("act_outliers", [look(50, act_peak=120.0)], [look(50, act_peak=30.0)], "q", "quant.act_hadamard=true"),
        (
            "term_drowns",
            [{"step": 100, **NORMS}, {"step": 200, **NORMS}],
            [{"step": 100, **NORMS}, {"step": 200, **NORMS, "optim/grad_norm/ce": 9.0}],
            "kl",
            "distill.balance=100",
        ),
        ("loss_spikes", series("train/ce", SPIKES), series("train/ce", NOISE), "", "trainer.gradient_clip_val=0.5"),
        ("plateau", FLAT, [*FLAT[:-1], {**FLAT[-1], "val/gap": 0.1}], "", ""),
        ("plateau", FLAT, [*FLAT[:-1], {**FLAT[-1], "val/ce": 1.98}], "", ""),  # training is flat while soft codes harden
        ("teacher_mismatch", [{**HELD_OUT, "val/teacher_ce": 2.3}], [HELD_OUT], "", "distill=none"),
        ("teacher_mismatch", [{**HELD_OUT, "val/teacher_ce": 9.0, "val/ce": 9.5}], [HELD_OUT], "", "model.teacher=shared"),
    ],
)
def test_alarms_on_series(kind: str, bad: list[Any], good: list[Any], where: str, key: str) -> None:
    [found] = raised(kind, bad)
    assert (found.where, found.key) == (where, key) and found.text and "\n" not in found.text
    assert raised(kind, good) == []


def test_layers_and_families_without_gradient() -> None:
    families = {"a.q_proj": "q", "b.q_proj": "q", "a.v_proj": "v"}
    gradients = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, np.nan]])
    [found] = raised("no_gradient", [look(50)], gradients=gradients, families=families)
    assert (found.where, found.key) == ("a.q_proj", "model.exclude=[a.q_proj]")
    gradients[1, 1] = 0
    [found] = raised("no_gradient", [look(50)], gradients=gradients, families=families)
    assert (found.where, found.key) == ("q", "model.exclude=[*q_proj]") and "no gradient reaches the q layers" in found.text


def test_a_flat_loss_in_a_run_of_few_rows() -> None:
    rows = [*series("train/ce", NOISE[:12], every=30), look(360), *({**FLAT[-1], "step": step} for step in (180, 360))]
    [found] = raised("plateau", rows)  # 15 % of the run hold five of them
    falling = [2.5 - 0.05 * i for i in range(12)]
    assert "so wait" in found.text and not raised("plateau", [*series("train/ce", falling, every=30), *rows[12:]])


def test_a_rate_to_try() -> None:
    assert Facts(steps=1, lr=3e-3).slower == "optim.lr=0.001"
    assert Facts(steps=1, lr=2.0, usual=3e-3).slower == "optim.lr=0.003"


def test_data_read_too_often() -> None:
    [found] = raised("data_repeated", [look(50)], Facts(steps=1000, passes=40))
    assert (
        found.key.startswith("trainer.max_steps=400 ") and raised("data_repeated", [look(50)], Facts(steps=1000, passes=10)) == []
    )


def test_nothing_is_said_before_the_run_has_settled() -> None:
    facts = Facts(steps=1000, settled=500)
    warmed = [*series("train/ce", [1.0] * 20 + [4.0] * 20), *(look(step, flip_rate=0.0) for step in (50, 100, 150))]
    assert raised("", warmed, facts) == [] and raised("", []) == []


def test_a_rule_for_each_kind() -> None:
    assert len(RULES) == 12 and all(rule.__doc__ for rule in RULES.values())
