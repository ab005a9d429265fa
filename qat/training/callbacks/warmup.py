"""Warm-ups: blend quantization, or norms of layers' own inputs, in over the first steps instead of all at once.

What is validated or sampled meanwhile is what would be deployed, with all of it, as of soft codes (`anneal`): of the blend a
validation would give the best value of the run before anything is quantized, and whoever judges by it would pack that step.
"""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl

from qat.conversion.layers import bitlinears, set_lambda, set_norm_blend
from qat.training.schedule import lambda_at


class LambdaWarmup(pl.Callback):
    """Sets lambda before each batch by a schedule of `steps` steps: a function of the step, so a resumed run continues it."""

    def __init__(self, steps: int, kind: str = "linear") -> None:
        self.steps, self.kind = steps, kind

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Before each batch."""
        layers = dict(bitlinears(module.student))  # type: ignore[arg-type]
        places = blocks_of(list(layers))
        count = max(places.values(), default=0) + 1
        for name, layer in layers.items():
            layer.set_lambda(lambda_at(trainer.global_step, self.steps, self.kind, places[name], count))

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Until the next batch of the training."""
        set_lambda(module.student, 1.0)  # type: ignore[arg-type]

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """What is evaluated and packed is fully quantized."""
        set_lambda(module.student, 1.0)  # type: ignore[arg-type]


class NormWarmup(pl.Callback):
    """Blends the norms of layers' own inputs in: b = min(step / steps, 1), likewise."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Before each batch."""
        set_norm_blend(module.student, lambda_at(trainer.global_step, self.steps))  # type: ignore[arg-type]

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Until the next batch of the training."""
        set_norm_blend(module.student, 1.0)  # type: ignore[arg-type]

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """What is evaluated and packed has all of them."""
        set_norm_blend(module.student, 1.0)  # type: ignore[arg-type]


def blocks_of(names: list[str]) -> dict[str, int]:
    """Name of a layer -> the place of its block, 0 the first.

    A block is what has one number in a list of modules, by the first number after what all names share: `h.3` of `h.3.attn.proj`.
    A layer outside of such lists is a block of its own, and so is each layer of a model of one block.
    """
    parts = {name: name.split(".") for name in names}
    shared = len(os.path.commonprefix(list(parts.values())))
    places: dict[tuple[str, ...], int] = {}
    return {name: places.setdefault(_block(part, shared), len(places)) for name, part in parts.items()}


def _block(part: list[str], shared: int) -> tuple[str, ...]:
    number = next((i for i in range(shared, len(part)) if part[i].isdigit()), len(part) - 1)
    return tuple(part[: number + 1])
