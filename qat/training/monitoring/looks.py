"""Looks at the quantized layers every few steps: `quant/...` of families in metrics.csv, and of each layer in layers.arrow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from qat import parallel
from qat.conversion.families import families
from qat.conversion.layers import bitlinears
from qat.monitor.bits import Bits, packed
from qat.monitor.inputs import Inputs
from qat.monitor.layers import LayersFile
from qat.monitor.sums import Sums, groupwise, layerwise
from qat.monitor.table import HEALTH
from qat.monitor.trace import Trace
from qat.monitor.weights import weight_sums
from qat.training.callbacks.boundary import step_ends
from qat.training.gradients.clipping import gradient_norm
from qat.training.strategies.sharding import is_sharded
from qat.training.strategies.shards import begins, gathered, local

if TYPE_CHECKING:
    from qat.training.module import QATModule

_SAMPLE = 1 << 14
"""Latent weights of a layer, evenly spaced, whose change in a step is measured: a copy of all would cost memory."""


class Monitor(pl.Callback):
    """Looks before the first step and after every `every`-th: a function of the step, so a resumed run looks where it must.

    Codes of the start and of the last look, and what changed lately, are in checkpoints, a byte a code. It stands last among
    what prepares a step, so that its hooks hear the training's own forward passes and no other. A compiled model, which hooks
    would compile anew, runs once more for them.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self._trace: dict[str, Any] = {}
        self.trace: Trace | None = None
        self._handles: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, module: QATModule) -> None:  # type: ignore[override]
        """Begin what no checkpoint has brought, and look at the start."""
        self.layers = dict(bitlinears(module.student))
        self.families = families(self.layers)
        self.file = LayersFile(self.folder, self.families, trainer.global_step or None) if parallel.first() else None
        self.latest: dict[str, np.ndarray] = {}
        """Statistic -> value of each layer, float32 [L], at the last look."""
        self._inputs, self._sample, self._gradients = Inputs(self.layers), list[Tensor](), dict[str, Tensor]()
        self._divided = is_sharded(module.student)
        if not self.layers:
            return
        if self._trace:
            place = torch.device("cpu") if self._divided else module.device
            self.trace = Trace.of(self._trace["codes"], place) if parallel.first() else None
            self.scales = np.array(self._trace["scales"])
        else:
            codes, sums = self._seen()
            self.trace = Trace.begun(codes) if codes else None
            self.scales = sums["scale"][0]
            self._write(trainer.global_step, layerwise(sums))

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: pl.Trainer, module: QATModule, batch: Any, batch_idx: int
    ) -> None:
        """Listen to all batches of a step after which there is a look."""
        if (trainer.global_step + 1) % self.every:
            return
        if module.compiled:
            self._run_once_more(trainer, module, batch)
        elif not self._handles:
            self._handles = self._inputs.attach()

    def _run_once_more(self, trainer: pl.Trainer, module: QATModule, batch: Any) -> None:
        devices = [module.device] if module.device.type == "cuda" else []
        precision = trainer.precision_plugin.train_step_context()
        with torch.random.fork_rng(devices), torch.no_grad(), self._inputs.listening(), precision:
            module.student(**module.view.inputs(module.student, batch))

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        """Gradients before clipping, and a sample of the weights before the step."""
        if (trainer.global_step + 1) % self.every:
            return
        found = {name: layer.weight.grad for name, layer in self.layers.items() if layer.weight.grad is not None}
        squares = [gradient_norm([local(one)]).square() for one in found.values()]
        self._gradients = dict(zip(found, self._over_devices(squares), strict=True))
        self._sample = [_sampled(layer.weight).clone() for layer in self.layers.values()]

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: QATModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The look. Between batches nobody listens: what measures before the next one is no training."""
        self._stop_listening()
        if not step_ends(trainer, batch_idx) or trainer.global_step % self.every or not self.layers:
            return
        self._inputs.over_ranks()
        sums = self._look()
        self.latest = layerwise(sums)
        module.row |= groupwise(sums, [*self.families.values()], [*HEALTH])
        module.row |= self._update_ratio()
        self._write(trainer.global_step, self.latest)
        self._inputs.forget()
        self._gradients, self._sample = {}, []

    def _write(self, step: int, values: dict[str, np.ndarray]) -> None:
        if self.file is not None:
            self.file.write(step, values)

    @torch.no_grad()
    def _look(self) -> Sums:
        codes, own = self._seen()
        found = parallel.shared(lambda: self._changed(codes))
        drift = {"scale_drift": (own["scale"][0] - self.scales, self.scales)}
        gradients = {name: {"grad_norm": (square, square)} for name, square in self._gradients.items()}
        return {**found, **own, **drift, **_table(self.layers, self._inputs.sums), **_table(self.layers, gradients)}

    def _changed(self, codes: list[Bits]) -> Sums:
        assert self.trace is not None
        self.trace, changes = self.trace.looked(codes)
        sizes = np.array([layer.weight.numel() * layer.config.planes for layer in self.layers.values()], dtype=np.float64)
        return {name: (counts.double().cpu().numpy(), sizes) for name, counts in changes.items()}

    def _seen(self) -> tuple[list[Bits], Sums]:
        """Codes of all layers as bits, and what they and their weights say.

        Of weights in parts one layer after another is whole. Rank 0 alone keeps codes, then in the CPU's memory, and traces them.
        """
        kept, found = list[Bits](), dict[str, dict[str, tuple[Tensor, Tensor]]]()
        for name, layer in self.layers.items():
            with gathered(layer):
                codes, scale = layer.quantized()
                found[name] = weight_sums(layer, codes, scale)
            if parallel.first():
                kept.append(packed(codes.cpu() if self._divided else codes))
        return kept, _table(self.layers, found)

    def _over_devices(self, squares: list[Tensor]) -> list[Tensor]:
        """Sums over the parts, where weights are divided; else they are of whole weights already."""
        return parallel.sums(squares) if self._divided else squares

    @torch.no_grad()
    def _update_ratio(self) -> dict[str, float]:
        now = [_sampled(layer.weight) for layer in self.layers.values()]
        norms = [
            torch._foreach_norm(one, 2, dtype=torch.float64) for one in (torch._foreach_sub(now, self._sample), self._sample)
        ]
        squares = self._over_devices([torch.stack(one).square().sum() for one in norms])
        changed, before = (square.sqrt().item() for square in squares)
        return {"optim/update_ratio": changed / before} if before else {}

    def _stop_listening(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self._stop_listening()

    def state_dict(self) -> dict[str, Any]:
        """Codes as bits, and the scales of the start."""
        return {"codes": self.trace.state(), "scales": self.scales.tolist()} if self.layers and self.trace else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Until the layers are there."""
        self._trace = state_dict


def _sampled(weight: Tensor) -> Tensor:
    """Of a weight in parts, what of the whole one's sample lies here."""
    step = -(-weight.numel() // _SAMPLE)
    return local(weight.detach()).reshape(-1)[-begins(weight) % step :: step]


def _table(layers: Any, found: dict[str, dict[str, tuple[Tensor, Tensor]]]) -> Sums:
    """Statistic -> sums and counts of all layers; NaN where one has none."""
    names = list(dict.fromkeys(name for one in found.values() for name in one))
    missing = torch.tensor(float("nan"), dtype=torch.float64)

    def column(name: str, part: int) -> np.ndarray:
        values = [found.get(layer, {}).get(name, (missing, missing))[part] for layer in layers]
        return torch.stack([value.double().to(values[0].device) for value in values]).cpu().numpy()

    return {name: (column(name, 0), column(name, 1)) for name in names}
