"""QATModule: the LightningModule that trains a converted student, with or without a teacher.

Every mean is a sum over a count, and the count is that of the whole optimizer step: the loader writes beside each batch how many
tokens its step predicts, so the loss of a batch is its sum over that number and gradients of accumulated batches simply add up.
Ranks are such batches too: the count is that of all, and as gradients are averaged, each multiplies its share by their number.
A mean of the batches' means would weigh a token of a short chat more than one of a long chat. (Dividing the gradients at the
step instead would need no look-ahead, but sums overflow float16, and clipping and the scaler would have to be told.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from qat import parallel
from qat.config import DistillConfig, OptimConfig
from qat.data.order import REPEATED, STEP_TOKENS
from qat.losses import active, measured, needs, weight_at
from qat.losses.means import Means
from qat.losses.record import Loss, Pair, Seen
from qat.losses.relation import settled
from qat.losses.taps import TAPS, Taps
from qat.losses.views import TEXT, UNPADDED, View
from qat.models.masks import known_masks
from qat.nn.apart import Apart
from qat.training.callbacks.boundary import step_ends
from qat.training.gradients.clipping import clip
from qat.training.gradients.groups import parameter_groups
from qat.training.gradients.rates import Rates
from qat.training.gradients.sums import Sums
from qat.training.strategies.optimizer_names import named, numbered
from qat.training.strategies.sharding import is_sharded

LARGEST = 80.0
"""Of cross-entropies: its exponential is a float32."""
SINCE = "losses_since_row"
"""Key of checkpoints: the batches since the last row, of all ranks in turn."""

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class QATModule(pl.LightningModule):
    """Trains `student` on batches of input_ids, labels and optionally attention_mask, each int64 [B, L].

    The teacher is frozen and is no part of checkpoints. Latent weights, gradients and optimizer state are float32 in
    every precision. `train/<loss>` are means over the tokens since the last row, `val/<loss>` over all of the validation.
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
        view: View = TEXT,
        scores: MetricCollection | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.compiled = compile  # the student itself stays eager: it is what is evaluated and packed
        self._forward = Apart(torch.compile(student) if compile else student)  # type: ignore[arg-type]
        self._teacher = Apart(teacher.eval().requires_grad_(False)) if teacher is not None else None
        self.distill, self.optim, self.total_steps = settled(distill_config, student), optim_config, total_steps
        self._optimizer, self.view = optimizer, view
        self.scores = scores
        self._asked = {f"output_{what}": True for what in ("hidden_states", "attentions") if needs(distill_config, what)}
        self.factors: dict[str, float] = {}
        """Loss -> what balancing multiplies its weight by; 1 where it says nothing."""
        self.row: dict[str, float] = {}
        """What callbacks measured of this step, for metrics.csv and loggers."""
        self.shown: dict[str, float] = {}
        """What progress shows: `loss` and `tok/s`."""
        self.clipped_norms: list[Tensor] = []
        """Gradient norms before clipping, of the steps since somebody emptied it."""
        self.references: dict[str, float] = {}
        """Cross-entropies of other models on the text of the validations: `full_precision`, `teacher`."""
        self.exact = exact
        """`trainer.gradient_sums=float64`: gradients are added up over ranks, and no mean of them is taken."""
        self.sums = Sums()
        self._since, self._held_out = Means(), Means()
        self._taps = Taps(student, teacher, [what for what in TAPS if needs(self.distill, what)], self.distill)

    def release(self) -> None:
        """Take the hooks off student and teacher."""
        self._taps.remove()

    def weights(self) -> dict[str, float]:
        """Loss -> its weight at this step."""
        return self.weights_at(self.global_step)

    def weights_at(self, step: int) -> dict[str, float]:
        """Loss -> its weight: a function of the step (0-based), times its factor now where weights are balanced."""
        return {
            name: weight_at(self.distill, name, step, self.total_steps) * self.factors.get(name, 1.0)
            for name in active(self.distill)
        }

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """While it is on the CPU: what a step would have to wait for a GPU to tell."""
        return self.view.known(batch)

    def on_fit_start(self) -> None:
        """Move the teacher, which lightning does not know of."""
        if self._teacher is not None:
            self._teacher.module.to(self.device)

    def pairs(self, batch: dict[str, Tensor]) -> dict[str, Pair]:
        """Loss -> its sum over the batch's predicted tokens, and their number; in training, of those that have a weight now."""
        training = torch.is_grad_enabled()
        graded = {name for name, weight in self.weights().items() if weight and training}
        return self._measured(batch, self._rows(training), graded, self._forward.module)

    def terms(self, batch: dict[str, Tensor]) -> dict[str, Pair]:
        """The same, on the eager student, each with its gradient whatever its weight."""
        rows = self._rows(training=True)
        return self._measured(batch, rows, set(rows), self.student)

    def _rows(self, training: bool) -> dict[str, Loss]:
        weights = self.weights()
        return {name: row for name, row in measured(self.distill).items() if row.reported or weights[name] or not training}

    def _measured(self, batch: dict[str, Tensor], rows: dict[str, Loss], graded: set[str], forward: nn.Module) -> dict[str, Pair]:
        seen, found = self._seen(batch, rows, forward), {}
        held_out = not torch.is_grad_enabled() and REPEATED not in batch
        if self.scores is not None and held_out:
            self.scores.update(seen.rows, seen.targets)
        if seen.teacher is not None and held_out:
            best = [self.view.rows(one.logits.argmax(-1, keepdim=True), batch) for one in (seen.student, seen.teacher)]
            self._held_out.add({"agreement": ((best[0] == best[1]).sum(), len(best[0]))})
        for name, row in rows.items():
            with torch.set_grad_enabled(name in graded):
                found[name] = row.function(seen, self.distill)
        return found

    def _seen(self, batch: dict[str, Tensor], rows: dict[str, Loss], forward: nn.Module) -> Seen:
        inputs, teacher, view = self.view.inputs(self.student, batch), None, self.view
        asked = {what for what in TAPS if any(getattr(row, what) for row in rows.values())}
        answers = nullcontext() if self.compiled else known_masks(inputs, batch.get(UNPADDED))  # type: ignore[arg-type]
        with self._taps.listening(asked) as pairs, answers:
            student = forward(**inputs, **self._asked)
            if self._teacher is not None and any(row.teacher for row in rows.values()):
                with torch.no_grad():
                    teacher = self._teacher.module(**inputs, **self._asked)
        student_rows, teacher_rows = student.logits.new_empty(0, student.logits.shape[-1]), None
        if not self.distill.kl_chunk or any(row.whole_rows for row in rows.values()):
            student_rows = view.rows(student.logits, batch)
            teacher_rows = None if teacher is None else view.rows(teacher.logits, batch)
        attended = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        targets, chosen, shares = view.targets(batch), view.predicts(batch), view.shares(batch)
        known = {"attended": attended, "shares": shares, "picked": (view.index(batch),)}
        return Seen(student_rows, targets, chosen, teacher_rows, student, teacher, **pairs, **known)  # type: ignore[arg-type]

    def loss(self, sums: dict[str, Tensor], count: float) -> Tensor:
        """The weighted sum of the losses, each `sums[name] / count`."""
        terms = (weight * (sums[name] / max(count, 1)) for name, weight in self.weights().items() if weight)
        return functools.reduce(torch.add, terms)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """This batch's share of the step's loss, times the batches of a step and the ranks, by which it will be divided."""
        self._ends = step_ends(self.trainer, batch_idx)
        pairs = self.pairs(batch)
        share = self.loss({name: total for name, (total, _) in pairs.items()}, batch[STEP_TOKENS])
        self._since.add({"loss": (share * batch[STEP_TOKENS], max(count for _, count in pairs.values())), **pairs})
        if self._ends and (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log_row()
        divided = self.trainer.accumulate_grad_batches * self.averaged_over
        return share if divided == 1 else share * divided

    @property
    def averaged_over(self) -> int:
        """Ranks, by whose number the strategy divides the sum of gradients."""
        return 1 if self.exact else parallel.size()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Called by lightning."""
        super().backward(loss, *args, **kwargs)
        if not self.exact or self.trainer.accumulate_grad_batches == 1 or is_sharded(self.student):
            return
        if not self._ends:
            self.sums.keep(self.student.parameters())
        elif parallel.size() == 1:  # of several, the strategy does it
            self.sums.settle(self.student.parameters())

    def _log_row(self) -> None:
        """Means since the last row, at a step's last batch, on all ranks; step 1 is the first.

        Nothing is logged of other steps: it would cost a small model a tenth of their time, and a GPU would be waited for.
        """
        found, self._since = self._since.over_ranks().values(), Means()
        unmeasured = dict.fromkeys(measured(self.distill), float("nan"))  # which lightning would repeat from an earlier row
        self.log_dict({f"train/{name}": value for name, value in {**unmeasured, **found}.items()}, batch_size=1)
        if self.distill.balance is not None:
            self.log_dict({f"train/weight/{name}": weight for name, weight in self.weights().items()}, batch_size=1)
        self.show("loss", found["loss"])
        self.log("step", float(self.global_step + 1), batch_size=1)

    def show(self, name: str, value: float) -> None:
        """For whoever shows progress. What lightning shows it reads on the device after each batch, so it hears of it only where
        a progress bar of its own is there."""
        self.shown[name] = value
        self.log(name, value, prog_bar=self.trainer.progress_bar_callback is not None, logger=False, batch_size=1)

    def _means(self, means: Means) -> dict[str, float]:
        found = means.values()
        loss = sum(weight * found[name] for name, weight in self.weights().items() if weight)
        return {"loss": loss, **found}

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._held_out = Means()
        if self.scores is not None:
            self.scores.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch of held-out text to the sums."""
        pairs = self.pairs(batch)
        if REPEATED not in batch:
            self._held_out.add(pairs)

    def on_validation_epoch_end(self) -> None:
        """`val/ce` and the others, means over all of the validation's tokens."""
        scores = self.scores.compute() if self.scores is not None else {}
        found = self._means(self._held_out.over_ranks())
        if self.view.words:
            found["perplexity"] = math.exp(min(found["ce"], LARGEST))
        found |= {f"{name}_ce": ce for name, ce in self.references.items()}
        if "full_precision" in self.references:
            found["gap"] = found["ce"] - self.references["full_precision"]
        self.log_dict({f"val/{name}": value for name, value in {**found, **scores}.items()})
        self.log("step", float(self.global_step))

    def configure_model(self) -> None:
        """Nothing: `student` came as it is trained, also in parts on several devices."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The optimizer's state by names, for runs that group or shard otherwise; the row that is begun."""
        if (states := checkpoint.get("optimizer_states")) is not None:  # a ModelCheckpoint may save weights alone
            checkpoint["optimizer_states"] = [named(one, self._groups()) for one in states]
            checkpoint[SINCE] = self._since.over_ranks().batches

    def _groups(self) -> dict[str, list[str]]:
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return {group["name"]: [names[id(p)] for p in group["params"]] for group in parameter_groups(self.student, self.optim)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count batches from the step, as the number of batches a step may have changed since."""
        self._since = Means.of_this_rank(checkpoint.get(SINCE, []))
        checkpoint["optimizer_states"] = [numbered(one, self._groups()) for one in checkpoint["optimizer_states"]]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        batches = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):
            # as lightning has them in on_train_batch_end, which is where checkpoints of qat are written
            counts.update(ready=batches, started=batches, processed=batches, completed=batches - 1)

    def on_train_start(self) -> None:
        """Rates, decay and betas are the configuration's, also where a checkpoint brought older ones."""
        self._rates.resume(self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler, self.global_step)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """By the norm in float64; lightning's own for other ways, and where it refuses an optimizer that unscales by itself."""
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if gradient_clip_algorithm in (None, "norm") and not (scaled and getattr(optimizer, "_step_supports_amp_scaling", False)):
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            norm = clip(parameters, float(gradient_clip_val)) if gradient_clip_val else None
            self.clipped_norms += [] if norm is None else [norm]
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        """Parameter groups, and the schedules as a function of the optimizer step."""
        optimizer = self._optimizer(parameter_groups(self.student, self.optim))
        self._rates = Rates(optimizer, self.optim, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._rates.scheduler(), "interval": "step"}}
