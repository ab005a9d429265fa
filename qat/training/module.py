"""QATModule: the LightningModule that trains a converted student, with or without a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from qat.config import DistillConfig, OptimConfig
from qat.conversion.layers import bitlinears
from qat.losses import logits as distill
from qat.training import schedule

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class QATModule(pl.LightningModule):
    """Trains `student` on batches of input_ids, labels and optionally attention_mask, each int64 [B, L].

    The teacher is frozen and is no part of checkpoints. Latent weights, gradients and optimizer state are float32 in
    every precision.
    """

    def __init__(
        self,
        student: nn.Module,
        distill_config: DistillConfig,
        optim_config: OptimConfig,
        optimizer: OptimizerFactory,
        total_steps: int,
        teacher: nn.Module | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        # In a tuple, so that it is no submodule. The student itself stays eager: it is what is evaluated and packed.
        self._forward = (torch.compile(student) if compile else student,)
        self.distill, self.optim, self.total_steps = distill_config, optim_config, total_steps
        self._optimizer = optimizer
        # In a tuple, so that it is neither saved nor optimized.
        self._teacher = (teacher.eval().requires_grad_(False),) if teacher is not None else ()

    def on_fit_start(self) -> None:
        """Move the teacher, which lightning does not know of."""
        for teacher in self._teacher:
            teacher.to(self.device)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` and its parts `ce` and `kl`, nats a token."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        rows, targets = distill.predicted(self._forward[0](**inputs, use_cache=False).logits, batch["labels"])
        parts = {"ce": distill.cross_entropy(rows, targets)}
        loss = self.distill.ce * parts["ce"]
        for teacher in self._teacher:
            with torch.no_grad():
                teacher_rows, _ = distill.predicted(teacher(**inputs, use_cache=False).logits, batch["labels"])
            parts["kl"] = distill.logits_kl(rows, teacher_rows, self.distill.temperature)
            loss = loss + self.distill.kl * parts["kl"]
        return {"loss": loss, **parts}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One batch forward; the loss is logged as `train/loss`."""
        losses = self.losses(batch)
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, batch_size=1)
        self.log("loss", losses["loss"].detach(), prog_bar=True, logger=False, batch_size=1)
        return losses["loss"]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Cross-entropy on held-out text, logged as `val/ce`."""
        size = batch["input_ids"].shape[0]
        self.log_dict({f"val/{k}": v for k, v in self.losses(batch).items()}, batch_size=size, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Parameter groups, and the schedules as a function of the optimizer step."""
        optimizer = self._optimizer(parameter_groups(self.student, self.optim))
        decay = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]

        def factor(step: int) -> float:
            for group, value in zip(optimizer.param_groups, decay, strict=True):
                group["weight_decay"] = value * schedule.weight_decay_factor(step, self.total_steps, self.optim.schedule)
            return schedule.lr_factor(
                step, self.total_steps, self.optim.schedule, self.optim.warmup_steps, self.optim.final_lr_fraction
            )

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Latent weights at lr * latent_lr_multiplier; other matrices at lr; norms and biases without weight decay, and so the
    parameters of quantizers (learned scales), in a group of their own."""
    latent = {id(layer.weight) for _, layer in bitlinears(model)}
    own = {id(p) for _, layer in bitlinears(model) for p in layer.quantizer_parameters().values()}
    everything = [p for p in model.parameters() if p.requires_grad]
    trained = [p for p in everything if id(p) not in own]
    latents = [p for p in trained if id(p) in latent]
    matrices = [p for p in trained if id(p) not in latent and p.ndim >= 2]
    vectors = [p for p in trained if id(p) not in latent and p.ndim < 2]
    groups = [
        _group("latent", latents, optim.lr * optim.latent_lr_multiplier, optim.weight_decay),
        _group("matrices", matrices, optim.lr, optim.weight_decay),
        _group("vectors", vectors, optim.lr, 0.0),
        _group("quantizers", [p for p in everything if id(p) in own], optim.lr, 0.0),
    ]
    return [group for group in groups if group["params"]]


def _group(name: str, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> dict[str, Any]:
    return {"name": name, "params": list(params), "lr": lr, "weight_decay": weight_decay}
