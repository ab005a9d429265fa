"""Stop at the first loss or weight that is not finite, before it reaches a checkpoint.

On a GPU nobody waits for a loss: whether it is finite is on its way here while the next steps are asked for, and the optimizer is
told there not to step from the first bad one on, as a scaler of gradients would tell it. So the run ends a step or two later,
with the weights as the bad loss found them. It takes an optimizer whose steps are fused, which is what runs have there, and one
process; else the loss is waited for.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from qat import parallel
from qat.parallel import waiting
from qat.parallel.waiting import Sent
from qat.training.gradients.split import parts_of
from qat.training.strategies.sharding import is_sharded
from qat.training.strategies.shards import local


class NonFiniteError(ValueError):
    """The loss or a weight became NaN or infinite, in step `step`; the first is 1, and the optimizer need not have made it."""

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


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
        self._bad: Tensor | None = None
        """float32 [] on the device: 1 from the first bad loss on."""
        self._sent: deque[tuple[Sent, Sent, int, Any]] = deque()
        """Of the last batches what is on its way: `_bad`, the loss, their step, and the batch itself."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, to run it again where something is wrong."""
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        """Before the optimizer spreads NaN over every weight, so that the first bad one can still be told."""
        step = trainer.global_step + 1
        if waiting.waits(loss) and parallel.size() == 1 and (optimizers := _holdable(trainer)):
            self._send(optimizers, loss.detach(), step)
            return self._read(module, most=_AHEAD)
        bad = not bool(torch.isfinite(loss))
        if parallel.together(bad):
            _stop(module, self._batch, loss.item() if bad else None, step)

    def _send(self, optimizers: list[Any], loss: Tensor, step: int) -> None:
        bad = (~torch.isfinite(loss)).float()
        self._bad = bad if self._bad is None else torch.maximum(self._bad, bad)
        for optimizer in optimizers:
            optimizer.found_inf = self._bad
        self._sent.append((Sent(self._bad), Sent(loss), step, self._batch))

    def _read(self, module: pl.LightningModule, most: int = 0) -> None:
        """What has arrived, and all but the last `most`."""
        while self._sent and (len(self._sent) > most or self._sent[0][0].arrived()):
            bad, loss, step, batch = self._sent.popleft()
            if bad.read():
                _stop(module, batch, loss.read(), step)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Which waits for the device anyway."""
        self._read(module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The last step's."""
        self._read(module)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A finite loss can still step the weights to infinity: never save those."""
        self._read(module)
        weight = first_bad_weight(module.student)  # type: ignore[arg-type]
        if weight is not None:
            step = trainer.global_step
            raise NonFiniteError(_message("a weight", "not finite", step, f"first bad weight: {weight}"), step)


_AHEAD = 2
"""Batches after which what is on its way is waited for: a GPU that far behind has work."""


def _holdable(trainer: pl.Trainer) -> list[Any]:
    """The optimizers, if each can be told on the device not to step; else none."""
    parts = [part for optimizer in trainer.optimizers for part in parts_of(getattr(optimizer, "optimizer", optimizer))]
    held = all(group.get("fused") for part in parts for group in part.param_groups)
    return parts if held and trainer.strategy.precision_plugin.precision != "16-mixed" else []  # type: ignore[attr-defined]


def _stop(module: Any, batch: Any, loss: float | None, step: int) -> NoReturn:
    """Raise, naming what is bad; `loss` is None where it is another rank's."""
    student: nn.Module = module.student
    weight = first_bad_weight(student)
    # all ranks run it, as a model that is sharded needs all of them
    output = None if weight else first_bad_output(student, module.view.inputs(student, batch))
    where = f"first bad weight: {weight}" if weight else f"first bad output: {output or 'the loss'}"
    found = parallel.gathered(None if loss is None else _message("the loss", loss, step, where, _whose()))
    raise NonFiniteError(next(words for words in found if words), step)


def _whose() -> str:
    return f" on rank {parallel.rank()}" if parallel.size() > 1 else ""


def _message(what: str, value: Any, step: int, where: str, whose: str = "") -> str:
    return (
        f"{what} is {value} at step {step}{whose}; {where}. Checkpoints from before, if any, are kept;"
        " lower optim.lr or optim.latent_lr_multiplier, or raise optim.warmup_steps"
    )
