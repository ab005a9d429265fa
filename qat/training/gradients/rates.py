"""Learning rates, decay and betas of an optimizer's groups: as configured, and over the steps of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qat.config import OptimConfig
from qat.training import schedule
from qat.training.gradients.split import LATENT


class Rates:
    """Of an optimizer that has just been made, for so many steps; what is due at a step is a function of the step."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int) -> None:
        self.optimizer, self.config, self.total = optimizer, config, total_steps
        self._peaks = [(group["lr"], group.get("weight_decay", 0.0)) for group in optimizer.param_groups]
        self._betas = [{key: group[key] for key in ("betas",) if key in group} for group in optimizer.param_groups]

    def scheduler(self) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rates' and, with them, the decay's."""
        groups = self.optimizer.param_groups
        return torch.optim.lr_scheduler.LambdaLR(self.optimizer, [self._factor(group["name"] == LATENT) for group in groups])

    def _factor(self, latent: bool) -> Callable[[int], float]:
        """A plain function, of which checkpoints hold nothing."""
        return (lambda step: self._latent(step)) if latent else (lambda step: self._other(step))

    def resume(self, optimizer: Any, scheduler: Any, step: int) -> None:
        """Have both as configured at the step, also where a checkpoint brought older values."""
        scheduler.base_lrs = [lr for lr, _ in self._peaks]
        factors = [factor(step) for factor in scheduler.lr_lambdas]
        for group, (lr, _), factor in zip(optimizer.param_groups, self._peaks, factors, strict=True):
            group.update(initial_lr=lr, lr=lr * factor)
        for group, betas in zip(optimizer.param_groups, self._betas, strict=True):
            group.update(betas)
        self._set_decay(optimizer, step)

    def _other(self, step: int) -> float:
        self._set_decay(self.optimizer, step)
        warmup = self.config.warmup(self.total)
        return schedule.lr_factor(step, self.total, self.config.schedule, warmup, self.config.final_lr_fraction)

    def _latent(self, step: int) -> float:
        resting = self.config.annealed and step >= self.config.hard_from(self.total)
        return self._other(step) * (self.config.anneal_rest_lr if resting else 1.0)

    def _set_decay(self, optimizer: Any, step: int) -> None:
        factor = schedule.weight_decay_factor(step, self.total, self.config.schedule, self.config.weight_decay_until)
        for group, (_, decay) in zip(optimizer.param_groups, self._peaks, strict=True):
            group["weight_decay"] = decay * factor
