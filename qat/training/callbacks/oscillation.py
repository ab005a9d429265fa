"""Damping and freezing of latent weights that oscillate, as `qat.quantizers.oscillation` says, in a training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from qat import parallel
from qat.config import OptimConfig
from qat.conversion.layers import bitlinears
from qat.nn.bitlinear import BitLinear
from qat.quantizers.components import sum_components
from qat.quantizers.oscillation import Trace, damping_gradient
from qat.quantizers.scales import dequantize_weight
from qat.training.callbacks.boundary import step_ends
from qat.training.schedule import damping_at
from qat.training.strategies.shards import gathered, joined, local, rows


class Oscillation(pl.Callback):
    """Adds the damping's gradient before each optimizer step, its weight a function of the step; after each keeps frozen weights.

    Each step of damping, and each look for oscillation (`optim.oscillation_every`), costs one more quantization of the weights.
    A look between two others' steps sees no swing that is faster than it. Only steps that train with codes are looked at: none
    while codes are soft or blended in. What was counted and what is frozen is in checkpoints.
    """

    def __init__(self, optim: OptimConfig, total: int) -> None:
        self.optim, self.total = optim, total
        self.traces: dict[str, Trace] = {}
        self._weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        """Before gradients are clipped, as any other term of the loss."""
        weight = damping_at(trainer.global_step, self.total, self.optim.damping)
        if not weight:
            return
        for _, layer in bitlinears(module.student):  # type: ignore[arg-type]
            if layer.weight.grad is not None:
                with gathered(layer):
                    pull = damping_gradient(layer.weight, *layer.quantized(), layer.config.planes)
                mine = local(layer.weight.grad)
                mine.add_(rows(pull, layer.weight).to(mine.dtype), alpha=weight)

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin what no checkpoint has brought; of weights in parts each device remembers its rows."""
        self._weights = {name: layer.weight for name, layer in _layers(module)}
        if self.optim.freeze_oscillation is None:
            return
        for name, layer in _layers(module):
            found = self.traces.get(name)
            self.traces[name] = (
                Trace.begun(*_quantized(layer), layer.config.planes)
                if found is None
                else Trace(**{key: rows(value, layer.weight) for key, value in vars(found).items()})
            )

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each optimizer step: frozen weights go back to where they were, and every few steps there is a look."""
        if self.optim.freeze_oscillation is None or not step_ends(trainer, batch_idx):
            return
        looks = trainer.global_step % self.optim.oscillation_every == 0
        for name, layer in _layers(module):
            trace = self.traces[name] = self.traces[name].to(layer.weight.device)
            weight = local(layer.weight)
            weight.copy_(trace.held(weight))
            if looks and layer.lam is None and layer.beta is None:
                _look(layer, trace, self.optim.freeze_oscillation)

    def state_dict(self) -> dict[str, Any]:
        """Layer -> its trace, of all rows."""
        return {
            name: {key: joined(value.to(self._weights[name].device), self._weights[name]) for key, value in trace.state().items()}
            for name, trace in self.traces.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As it was written."""
        self.traces = {name: Trace(**state) for name, state in state_dict.items()}


def _layers(module: pl.LightningModule) -> list[tuple[str, BitLinear]]:
    student: nn.Module = module.student  # type: ignore[assignment]
    return list(bitlinears(student))


def _look(layer: BitLinear, trace: Trace, threshold: float) -> None:
    """Count, and freeze what is above the threshold at the level nearest to its running mean."""
    chosen, weight = trace.look(*_quantized(layer), layer.config.planes, threshold), local(layer.weight)
    if parallel.together(bool(chosen.any())):
        weight.copy_(torch.where(chosen, trace.mean.to(weight.dtype), weight))
        weight.copy_(torch.where(chosen, _levels(layer).to(weight.dtype), weight))
        trace.freeze(chosen, weight)


def _quantized(layer: BitLinear) -> tuple[Tensor, Tensor]:
    """Codes and scale of this device's rows, by the scales of the whole weight."""
    with gathered(layer):
        codes, scale = layer.quantized()
    return rows(codes, layer.weight), rows(scale, layer.weight)


def _levels(layer: BitLinear) -> Tensor:
    return sum_components(dequantize_weight(*_quantized(layer)), layer.config.planes)
