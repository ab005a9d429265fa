"""Stop at the first loss or weight that is not finite, before it reaches a checkpoint."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from qat import parallel
from qat.training.strategies.sharding import is_sharded
from qat.training.strategies.shards import local


class NonFiniteError(ValueError):
    """The loss or a weight became NaN or infinite."""


def first_bad_weight(model: nn.Module) -> str | None:
    """Name of the first parameter that holds NaN or infinity; of one in parts, on any device, each of which must ask."""
    mine = next((name for name, p in model.named_parameters() if not bool(torch.isfinite(local(p)).all())), None)
    found = set(parallel.gathered(mine)) if is_sharded(model) else {mine}
    return next((name for name, _ in model.named_parameters() if name in found), None)


def first_bad_output(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """Name of the first module whose output is not finite, found by running the model's `inputs` once more."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found[0] if found else None


class NonFiniteGuard(pl.Callback):
    """Raises NonFiniteError that names the step and the first bad module; the last checkpoint stays as it was."""

    def __init__(self) -> None:
        self._batch: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, to run it again where something is wrong."""
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        """Before the optimizer spreads NaN over every weight, so that the first bad one can still be told."""
        bad = not bool(torch.isfinite(loss))
        if not parallel.together(bad):
            return
        student: nn.Module = module.student  # type: ignore[assignment]
        weight = first_bad_weight(student)
        # all ranks run it, as a model that is sharded needs all of them
        output = None if weight else first_bad_output(student, module.view.inputs(student, self._batch))  # type: ignore[operator,union-attr]
        where = f"first bad weight: {weight}" if weight else f"first bad output: {output or 'the loss'}"
        step = trainer.global_step + 1
        found = parallel.gathered(_message("the loss", loss.item(), step, where, _whose()) if bad else None)
        raise NonFiniteError(next(words for words in found if words))

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A finite loss can still step the weights to infinity: never save those."""
        weight = first_bad_weight(module.student)  # type: ignore[arg-type]
        if weight is not None:
            raise NonFiniteError(_message("a weight", "not finite", trainer.global_step, f"first bad weight: {weight}"))


def _whose() -> str:
    return f" on rank {parallel.rank()}" if parallel.size() > 1 else ""


def _message(what: str, value: Any, step: int, where: str, whose: str = "") -> str:
    return (
        f"{what} is {value} at step {step}{whose}; {where}. The last good checkpoint is kept;"
        " lower optim.lr or optim.latent_lr_multiplier, or raise optim.warmup_steps"
    )
