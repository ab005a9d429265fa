"""The training module whose plain steps are replays: lightning's hooks in front of what a replay has done already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat.conversion.layers import bitlinears
from qat.data.order import STEP_TOKENS
from qat.training.gradients.clipping import clip
from qat.training.graph.checks import check_optimizer
from qat.training.graph.step import Capture, Outputs, WholeStep, cuda_graph
from qat.training.module import QATModule


class ReplayedModule(QATModule):
    """`QATModule` with `trainer.graph`.

    A replay holds forward, backward, clipping and the optimizer's step; what lightning asks for after it finds it done. Steps of
    rows and looks, and the first few, are not replayed.
    """

    capture: Capture = staticmethod(cuda_graph)
    looks: int | None = None
    """`trainer.monitor_every`: after how many steps there is a look at gradients and inputs."""
    _whole: WholeStep | None = None
    _replayed = False

    def on_train_start(self) -> None:
        """The optimizer is there now."""
        super().on_train_start()
        optimizer = self.trainer.optimizers[0]
        check_optimizer(optimizer)
        self._first = self.global_step
        self._whole = WholeStep(self._of_batch, lambda: self._clipped(optimizer), optimizer, self._frozen, type(self).capture)

    def _replays(self) -> bool:
        step = self.global_step + 1
        every = [self.trainer.log_every_n_steps, self.looks or step + 1]  # type: ignore[attr-defined]
        return step > self._first + 1 and all(step % one for one in every)

    def _of_batch(self, batch: dict[str, Any]) -> tuple[Tensor, Outputs]:
        with self.trainer.precision_plugin.train_step_context():
            pairs = self.pairs(batch)
            loss = self.loss({name: total for name, (total, _) in pairs.items()}, batch[STEP_TOKENS])
        self._counts = {name: count for name, (_, count) in pairs.items()}
        return loss, {f"sum {name}": total.detach() for name, (total, _) in pairs.items()}

    def _clipped(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        most = self.trainer.gradient_clip_val
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        return clip(parameters, float(most)) if most else None

    def _frozen(self) -> Any:
        """Where soft codes and lambda are carried, as they are read from there, and the weights of losses."""
        layers = [(layer.beta, layer.lam) for _, layer in bitlinears(self.student)]
        carried = {None if one is None else one.data_ptr() for pair in layers for one in pair}
        return self.weights(), self.student.training, carried

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss, of which nothing is left to do after a replay."""
        self._replayed = self._replays()
        if not self._replayed:
            return super().training_step(batch, batch_idx)
        assert self._whole is not None
        found = self._whole(batch)
        sums = {name: (found[f"sum {name}"], count) for name, count in self._counts.items()}
        self._since.add({"loss": (found["loss"] * batch[STEP_TOKENS], max(self._counts.values())), **sums})
        self.clipped_norms += [found["norm"]] if "norm" in found else []
        return found["loss"]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Called by lightning."""
        if not self._replayed:
            super().backward(loss, *args, **kwargs)

    def optimizer_step(  # type: ignore[override]
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any]
    ) -> None:
        """Called by lightning: the closure is the step's forward and backward."""
        if self._replays():
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
