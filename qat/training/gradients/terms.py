"""The gradient norm of each term of the loss on the latent weights: logged at validations, and weights are balanced by it.

It is that of a whole optimizer step, whose batches' gradients are added up, so that it does not depend on how the step was cut
into batches. The forward is one more, on the eager student: the backward pass of a compiled one can be made only once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from qat import parallel
from qat.conversion.layers import bitlinears
from qat.data.order import STEP_TOKENS
from qat.losses.balance import factors
from qat.training.callbacks.boundary import step_ends, validates
from qat.training.gradients.sums import aside
from qat.training.strategies.sharding import is_sharded
from qat.training.strategies.shards import local

if TYPE_CHECKING:
    from qat.training.module import QATModule


class TermGradients(pl.Callback):
    """Measures at the steps before a validation, and at step 0, `balance`, 2 `balance`, ... whose norms weigh the steps after.

    It stands behind callbacks that prepare the student for a step.
    """

    def __init__(self, balance: int | None, val_every: int | None) -> None:
        self.balance, self.val_every = balance, val_every
        self.factors: dict[str, float] = {}
        self.norms: dict[str, float] = {}
        self._sums: dict[str, list[Any]] = {}

    def on_train_start(self, trainer: pl.Trainer, module: QATModule) -> None:  # type: ignore[override]
        """Factors go on from the checkpoint."""
        module.factors = self.factors

    def on_train_batch_start(self, trainer: pl.Trainer, module: QATModule, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """Add this batch's share of each term's gradient."""
        step = trainer.global_step
        if self._balances(step) or validates(step + 1, self.val_every, trainer.max_steps):
            with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
                self._add(trainer, module, batch)

    def _add(self, trainer: pl.Trainer, module: QATModule, batch: Any) -> None:
        latents = [layer.weight for _, layer in bitlinears(module.student) if layer.weight.requires_grad]
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # float16 gradients vanish without its scale
        scale = scaler.get_scale() if scaler is not None else 1.0
        with trainer.precision_plugin.train_step_context():
            terms = module.terms(batch)
        whole = torch.stack([total for total, _ in terms.values()]).sum()
        for name, (total, _) in terms.items():
            share = total * (scale / max(batch[STEP_TOKENS], 1))
            found = _gradients(share, whole, latents, module)
            self._sums[name] = [
                old + (new.double() if module.exact else new) / scale
                for old, new in zip(self._sums.get(name, [0.0] * len(found)), found, strict=True)
            ]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Norms are known where the step ends, and hold from the next one on."""
        if self._sums and step_ends(trainer, batch_idx):
            self.norms = {name: _norm(sums, module.student) for name, sums in self._sums.items()}  # type: ignore[arg-type]
            self._sums = {}
            if self._balances(trainer.global_step - 1):
                self.factors.update(factors(self.norms))

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """`optim/grad_norm/<loss>`, of the step before."""
        module.log_dict({f"optim/grad_norm/{name}": norm for name, norm in self.norms.items()})

    def _balances(self, step: int) -> bool:
        return self.balance is not None and step % self.balance == 0

    def state_dict(self) -> dict[str, Any]:
        """Called by lightning when it saves."""
        return {"factors": dict(self.factors)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by lightning when it resumes."""
        self.factors.update(state_dict["factors"])


def _gradients(share: Tensor, whole: Tensor, latents: list[Any], module: QATModule) -> Sequence[Tensor]:
    """Of a rank's share of the term on latent weights; of weights in parts, all ranks' on the rows that are here.

    Those are gathered where a gradient comes to what their block gave. That of a term which looks inside of a block does not, so
    nothing times the `whole` loss goes with it.
    """
    if not is_sharded(module.student):
        return torch.autograd.grad(share, latents, retain_graph=True, materialize_grads=True)
    parameters = list(module.student.parameters())
    before = [parameter.grad for parameter in parameters]
    _set(parameters, [None] * len(before))
    with aside(module.student) as unrounded:
        (share * module.averaged_over + 0 * whole).backward(retain_graph=True)  # type: ignore[no-untyped-call]
        found = [torch.zeros_like(local(p.detach())) if p.grad is None else unrounded(local(p.grad)) for p in latents]
    _set(parameters, before)
    return found


def _set(parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _norm(gradients: list[Tensor], student: nn.Module) -> float:
    """Over all ranks, each of which has its share of every gradient, or its rows of all of it."""
    if not is_sharded(student):
        return _hypot(_over_ranks(gradients))
    squares = [torch.linalg.vector_norm(one, dtype=torch.float64).square() for one in gradients]
    return math.sqrt(sum(float(one) for one in parallel.sums(squares)))


def _over_ranks(gradients: list[Tensor]) -> list[Tensor]:
    """Added up in their own precision, as one process adds up those of its batches."""
    if parallel.size() == 1:
        return gradients
    return [total.to(one.dtype) for total, one in zip(parallel.sums(gradients), gradients, strict=True)]


def _hypot(gradients: list[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(one, dtype=torch.float64)) for one in gradients))
