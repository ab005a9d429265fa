"""Where optimizer steps end: the only place at which a checkpoint is exact, as gradients are no part of one."""

from __future__ import annotations

import lightning.pytorch as pl


def step_ends(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether batch `batch_idx` (0-based) is the last of an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0
