"""Damping and freezing in a run: what is held, the resume, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_run import killed_and_resumed, losses
from torch import nn

import qat
from qat.config import OptimConfig, QuantConfig, TrainConfig
from qat.conversion.layers import bitlinears
from qat.quantizers.oscillation import damping_gradient
from qat.train import run
from qat.training.callbacks import Oscillation
from qat.training.schedule import damping_at

FREEZE = {"lr": 2e-2, "freeze_oscillation": 0.005}
"""Frozen at the first swing, at a rate that makes them."""


class Watch(pl.Callback):
    """Frozen weights after each step, and that they are where they were frozen."""

    frozen: list[int] = []  # noqa: RUF012

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        (callback,) = [one for one in trainer.callbacks if isinstance(one, Oscillation)]  # type: ignore[attr-defined]
        count = 0
        for name, layer in bitlinears(module.student):  # type: ignore[arg-type]
            trace = callback.traces[name]
            assert torch.equal(layer.weight[trace.frozen], trace.mean[trace.frozen])
            count += int(trace.frozen.sum())
        self.frozen.append(count)


def test_frozen_weights_stay_and_a_resume_is_exact(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "frozen", [])
    config.optim, config.quant = (
        replace(config.optim, **FREEZE, damping=0.01, oscillation_every=2),
        QuantConfig(granularity="channel"),
    )
    config.callbacks = {"watch": {"_target_": "test_oscillation.Watch"}}
    result = run(config)
    assert Watch.frozen[0] == 0 and Watch.frozen == sorted(Watch.frozen) and Watch.frozen[-1] > 0
    assert result.verification["packed_max_logit_difference"] == 0 and result.perplexity["packed"] == result.perplexity["trained"]
    config.callbacks = {}
    parts = killed_and_resumed(config, tmp_path / "parts", step=7, checkpoint_every=5)
    assert losses(parts) == losses(Path(result.folder))


def test_damping_is_a_term_of_the_loss() -> None:
    student = nn.Sequential(nn.Linear(8, 5, bias=False), nn.Linear(5, 4))
    qat.convert(student, include="*")
    for one in student.parameters():
        one.grad = torch.ones_like(one)
    optim = OptimConfig(damping=0.5)
    trainer: Any = SimpleNamespace(global_step=5)
    module: Any = SimpleNamespace(student=student)
    Oscillation(optim, total=10).on_before_optimizer_step(trainer, module, None)
    layer: Any = student[0]
    pull = damping_gradient(layer.weight, *layer.quantized(), 1)
    assert torch.allclose(layer.weight.grad, 1 + 0.25 * pull) and (layer.weight.grad != 1).any()
    assert student[1].bias.grad.eq(1).all()  # type: ignore[union-attr]


def test_damping_grows_by_a_cosine() -> None:
    assert [damping_at(step, 8, 3.0) for step in (0, 4, 8)] == pytest.approx([0.0, 1.5, 3.0])
    assert damping_at(2, 8, 1.0) == pytest.approx((1 - 2**-0.5) / 2)


def test_codes_that_are_chosen_together_are_not_frozen(config: TrainConfig) -> None:
    config.optim, config.quant = replace(config.optim, **FREEZE), QuantConfig(weight="sherry", granularity="channel")
    with pytest.raises(
        ValueError, match="freeze_oscillation=0.005 does not fit quant.weight=sherry, whose codes are chosen 4 at"
    ):
        config.check()


@pytest.mark.parametrize(
    "values", [{"damping": -1.0}, {"freeze_oscillation": 0.0}, {"freeze_oscillation": 1.5}, {"oscillation_every": 0}]
)
def test_values_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"optim.{next(iter(values))}=.* is not allowed"):
        OptimConfig(**values)
