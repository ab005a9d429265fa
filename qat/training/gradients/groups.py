"""Which parameters are stepped at which rate and with which decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from qat.config import OptimConfig
from qat.conversion.layers import bitlinears
from qat.training.gradients.split import LATENT


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
        _group(LATENT, latents, optim.peak * optim.latent_lr_multiplier, optim.weight_decay),
        _group("matrices", matrices, optim.peak, optim.weight_decay),
        _group("vectors", vectors, optim.peak, 0.0),
        _group("quantizers", [p for p in everything if id(p) in own], optim.peak, 0.0),
    ]
    return [group for group in groups if group["params"]]


def _group(name: str, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> dict[str, Any]:
    return {"name": name, "params": list(params), "lr": lr, "weight_decay": weight_decay}
