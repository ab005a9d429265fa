"""What a captured step cannot be, refused before anything long runs: each with the reason and what to set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch

from qat.config import TrainConfig

_IN_A_STEP = ("on_before_optimizer_step", "on_after_backward")
"""Hooks that look at gradients within a step, which a replay has behind it when Python is asked again."""

# (why not, whether that is so of the configuration and the device that it runs on)
_REASONS: tuple[tuple[str, Callable[[TrainConfig, torch.device], Any]], ...] = (
    ("it needs a CUDA GPU, and this run computes on a CPU", lambda c, device: device.type != "cuda"),
    ("data.kind=chat and task=classification have batches of many lengths, and a graph has one",
     lambda c, device: c.data.kind == "chat" or c.task == "classification"),
    ("it is of one device; set trainer.devices=1", lambda c, device: c.trainer.devices * c.trainer.num_nodes > 1),
    ("trainer.precision=16-mixed scales gradients by what it reads of each step; take bf16-mixed",
     lambda c, device: c.trainer.precision == "16-mixed"),
    ("it is of one batch; set trainer.accumulate_grad_batches=1, and a larger data.batch_size",
     lambda c, device: c.trainer.accumulate_grad_batches > 1),
    ("trainer.activation_checkpointing=true reads the random numbers' state in each layer",
     lambda c, device: c.trainer.activation_checkpointing),
    ("distill.kl_until, distill.hidden_until and distill.balance change the loss from step to step",
     lambda c, device: any(one is not None for one in (c.distill.kl_until, c.distill.hidden_until, c.distill.balance))),
    ("optim.rms_norm_steps blends norms in by a number of the CPU's", lambda c, device: c.optim.rms_norm_steps),
    ("optim.damping and optim.freeze_oscillation look at weights and gradients of every step",
     lambda c, device: c.optim.damping or c.optim.freeze_oscillation is not None),
)  # fmt: skip


def check_graph(config: TrainConfig, device: torch.device, callbacks: Iterable[pl.Callback]) -> None:
    """ValueError where `trainer.graph=true` cannot be, with the reason; `callbacks` are the user's."""
    if not config.trainer.graph:
        return
    why = next((words for words, applies in _REASONS if applies(config, device)), None) or _within_a_step(callbacks)
    if why is not None:
        raise ValueError(f"trainer.graph=true is not possible here: {why}")


def _within_a_step(callbacks: Iterable[pl.Callback]) -> str | None:
    for callback in callbacks:
        for hook in _IN_A_STEP:
            if getattr(type(callback), hook) is not getattr(pl.Callback, hook):
                return f"the callback {type(callback).__name__} has {hook}, which would wait in every step"
    return None


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """ValueError unless its steps can be captured: fused, so that what they count is on the device."""
    for group in optimizer.param_groups:
        if not group.get("fused") or "capturable" not in group or not getattr(optimizer, "replays", True):
            name = type(optimizer).__name__
            raise ValueError(
                f"trainer.graph=true needs an optimizer that is fused and capturable, such as torch.optim.AdamW, not {name}"
            )
