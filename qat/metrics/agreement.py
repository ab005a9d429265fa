"""Two causal language models on the same tokens: how far their distributions are apart, and in which layer it begins.

KL is KL(p_reference || p_model) in nats, the mean over the scored tokens of `perplexity.windows`; top-1 agreement is the
share of them for which both models hold the same token for the likeliest. A layer's error is
||y - y_reference|| / ||y_reference||, Frobenius norms over all tokens, in two ways:

    local        the layer is given the reference's input: what its own quantization costs
    accumulated  the layer is given what reaches it in its own model: the errors of all layers before it are in it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.conversion.selection import is_linear
from qat.metrics.perplexity import Window, logits_of


class Agreement(NamedTuple):
    """Means over `tokens` scored tokens; `reference_nll` is the reference's negative log-likelihood of them, in nats."""

    kl: float
    top1: float
    reference_nll: float
    tokens: int


def agreement(model: nn.Module, reference: nn.Module, batches: Iterable[Window]) -> Agreement:
    """KL(p_reference || p_model) and top-1 agreement on windows; both models must be in eval mode.

    Raises:
        ValueError: the vocabularies differ in size, or a logit is not finite.
    """
    kl, same, nll, count = 0.0, 0, 0.0, 0
    for ids, start in batches:
        for row, other, tokens in zip(logits_of(model, ids), logits_of(reference, ids), ids, strict=True):
            if row.shape != other.shape:
                raise ValueError(f"the vocabularies differ: {row.shape[-1]} tokens against the teacher's {other.shape[-1]}")
            mine, theirs = row[start - 1 : -1].float(), other[start - 1 : -1].float()
            logs = F.log_softmax(mine, -1), F.log_softmax(theirs, -1)
            kl += F.kl_div(*logs, reduction="sum", log_target=True).double().item()
            nll += F.nll_loss(logs[1], tokens[start:].to(other.device), reduction="sum").double().item()
            same += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
            count += len(mine)
    if not kl < float("inf"):
        raise ValueError(f"the KL divergence of the text is {kl}; a model's logits are not finite")
    return Agreement(kl / count, same / count, nll / count, count)


class LayerError(NamedTuple):
    """Relative errors of one layer's output."""

    local: float
    accumulated: float


def layer_errors(model: nn.Module, reference: nn.Module, ids: Tensor) -> dict[str, LayerError]:
    """Name -> errors of every linear layer that is another kind of layer in `model` than in `reference`, on ids [B, L].

    Raises:
        ValueError: no layer differs in kind, or `model` lacks one of the reference's layers.
    """
    names = _replaced(model, reference)
    theirs, mine = _record(reference, names, ids), _record(model, names, ids)
    found = {}
    for name in names:
        x, y = theirs[name]
        with torch.no_grad():
            alone = model.get_submodule(name)(x)
        found[name] = LayerError(relative_error(alone, y), relative_error(mine[name][1], y))
    return found


def _replaced(model: nn.Module, reference: nn.Module) -> list[str]:
    modules = dict(model.named_modules())
    linears = {name: module for name, module in reference.named_modules() if is_linear(module)}
    missing = [name for name in linears if name not in modules]
    if missing:
        raise ValueError(f"the teacher's layer {missing[0]} is not in the model; per-layer errors need the same architecture")
    names = [name for name, module in linears.items() if type(modules[name]) is not type(module)]
    if not names:
        raise ValueError("no layer of the model is quantized, so there are no per-layer errors")
    return names


def _record(model: nn.Module, names: Iterable[str], ids: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Input and output of each named layer in one forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0].detach(), output.detach()

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_hook(keep(name)).remove)
        logits_of(model, ids)
    absent = [name for name in names if name not in seen]
    if absent:
        raise ValueError(f"the layer {absent[0]} was not called; per-layer errors need every layer to run")
    return seen


def relative_error(y: Tensor, reference: Tensor) -> float:
    """||y - reference|| / ||reference||, Frobenius norms in float64."""
    y, reference = y.double(), reference.double()
    return ((y - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def beyond(found: Mapping[str, Any], tolerance: Mapping[str, float]) -> dict[str, str]:
    """What differs by more than it may, `found["<what>_difference"]` > tolerance[what], and by how much in words; NaN does."""
    return {
        what: f"by {found[f'{what}_difference']:.2e} (allowed {limit:g})"
        for what, limit in tolerance.items()
        if not found[f"{what}_difference"] <= limit
    }
