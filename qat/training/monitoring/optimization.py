"""Rates, decay, gradient norms and clipping in the rows of metrics.csv, as the step used them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from qat.conversion.layers import bitlinears
from qat.training.callbacks.boundary import step_ends
from qat.training.gradients.clipping import gradient_norm
from qat.training.gradients.split import LATENT

if TYPE_CHECKING:
    from qat.training.module import QATModule


class Optimization(pl.Callback):
    """`optim/...` of each row's step.

    lightning's LearningRateMonitor would log the rate of the step to come, and count steps from 0. The norms of clipping since
    the last row are in checkpoints, so that a resumed run's share is that of an undisturbed one.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.norms: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, module: QATModule) -> None:  # type: ignore[override]
        """Norms go on from the checkpoint."""
        module.clipped_norms = self.norms

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, module: QATModule, optimizer: Any) -> None:  # type: ignore[override]
        """Before gradients are clipped and the schedule goes on."""
        if (trainer.global_step + 1) % self.every:
            return
        groups = {group["name"]: group for group in optimizer.param_groups}
        module.row |= {f"optim/lr/{name}": group["lr"] for name, group in groups.items()}
        if LATENT not in groups:
            return
        module.row["optim/weight_decay"] = groups[LATENT].get("weight_decay", 0.0)
        module.row |= _blends(module)
        module.row |= _norm("optim/grad_norm_latents", groups[LATENT]["params"])
        if not trainer.gradient_clip_val:
            module.row |= _norm("optim/grad_norm", (p for group in groups.values() for p in group["params"]))

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: QATModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The norm that clipping has found, and how often it clipped since the last row."""
        if not step_ends(trainer, batch_idx) or trainer.global_step % self.every or not module.clipped_norms:
            return
        norms, most = torch.stack([norm.cpu() for norm in module.clipped_norms]), float(trainer.gradient_clip_val or 0)
        clipped = float((norms > most).double().mean())
        module.row |= {"optim/grad_norm": float(norms[-1]), "optim/clipped_share": clipped}
        module.clipped_norms.clear()

    def state_dict(self) -> dict[str, Any]:
        """The norms since the last row."""
        return {"norms": [float(norm) for norm in self.norms]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As they were written."""
        self.norms = [torch.tensor(norm, dtype=torch.float64) for norm in state_dict["norms"]]


def _norm(name: str, parameters: Iterable[Tensor]) -> dict[str, float]:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return {name: float(gradient_norm(gradients))} if gradients else {}


def _blends(module: QATModule) -> dict[str, float]:
    """Lambda, the least of all layers, and the sharpness of soft codes while they are soft."""
    layers = [layer for _, layer in bitlinears(module.student)]
    found = {"optim/lambda": min(1.0 if layer.lam is None else float(layer.lam) for layer in layers)} if layers else {}
    betas = {id(layer.beta): layer.beta for layer in layers if layer.beta is not None}
    return found | ({"optim/beta": min(float(beta) for beta in betas.values())} if betas else {})
