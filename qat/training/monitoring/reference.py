"""Full precision's cross-entropy on the text of the validations, once: what `val/gap` is counted from; and the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.data.order import REPEATED
from qat.losses.means import Means
from qat.training.strategies.placing import Place

if TYPE_CHECKING:
    from qat.training.module import QATModule


class References(pl.Callback):
    """Runs `models`, name -> model, on the batches of the first validation and no other: they do not change, nor do the batches.

    What was found is in checkpoints. A model is moved to the student's device and back.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self.models = models
        self.found: dict[str, float] = {}
        self._sums = Means()
        self.place: Place = lambda model: model
        """Of a model what runs in its place."""
        self._placed: dict[str, nn.Module] = {}

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin anew, also where a validation was cut short."""
        self._sums = Means()
        self._placed = {} if self.found else {name: self.place(model) for name, model in self.models.items()}

    @torch.no_grad()
    def on_validation_batch_start(  # type: ignore[override]
        self, trainer: pl.Trainer, module: QATModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add a batch."""
        if self.found:
            return
        for name, model in self._placed.items():
            with trainer.precision_plugin.val_step_context():
                found = _cross_entropy(model, module, batch)  # on every rank, as a model that is sharded needs all of them
            if REPEATED not in batch:
                self._sums.add({name: found})

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: QATModule) -> None:  # type: ignore[override]
        """Before the module logs its own."""
        self.found = self.found or self._sums.over_ranks().values()
        module.references, self._placed = self.found, {}

    def state_dict(self) -> dict[str, Any]:
        """Called by lightning when it saves."""
        return {"found": dict(self.found)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by lightning when it resumes."""
        self.found = state_dict["found"]


def _cross_entropy(model: nn.Module, module: QATModule, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Of the model in eval mode, its sum and count; the model is left where it was."""
    home, training = next(model.parameters()).device, model.training
    model.eval().to(module.device)
    rows = module.view.rows(model(**module.view.inputs(model, batch)).logits, batch)
    model.train(training).to(home)
    return F.cross_entropy(rows, module.view.targets(batch), reduction="sum"), len(rows)
