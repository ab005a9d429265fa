"""Where optimizer steps end: the only place at which a checkpoint is exact, as gradients are no part of one; and what follows."""

from __future__ import annotations

import lightning.pytorch as pl


def step_ends(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether batch `batch_idx` (0-based) is the last of an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def validates(step: int, every: int | None, last: int) -> bool:
    """Whether the optimizer step of number `step` (1-based) is validated: each of `every`, and the last of the run."""
    return every is not None and (step % every == 0 or step == last)
