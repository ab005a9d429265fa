"""Accuracy and F1 of a classifier over batches of examples: counts of all examples, divided once at the end (torchmetrics)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from qat import parallel

Batch = Mapping[str, Any]


def scores(labels: int) -> MetricCollection:
    """`accuracy`: the share of examples that are right; `f1`: the mean of the F1 of those labels that are given or predicted."""
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(labels, average="micro", validate_args=False),
            "f1": MulticlassF1Score(labels, average="macro", validate_args=False),
        }
    )


def own_share(batches: Sequence[Batch]) -> Sequence[Batch]:
    """Of batches that ranks share out those of this one; counts add up, so the order does not matter."""
    return batches[parallel.rank() :: parallel.size()]


@torch.inference_mode()
def classified(
    model: nn.Module, batches: Iterable[Batch], labels: int, inputs: Callable[[nn.Module, Batch], dict[str, Any]]
) -> dict[str, float]:
    """{"accuracy", "f1"} of `model`, which is put into eval mode and back, on batches with `labels` int64 [B].

    Where there are several ranks, each has its own batches, and all get the values of all of them.

    Raises:
        ValueError: a logit is not finite.
    """
    device, was_training = next(model.parameters()).device, model.training
    found = scores(labels).to(device)
    model.eval()
    try:
        with parallel.as_one():
            for batch in batches:
                here = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
                logits = model(**inputs(model, here)).logits
                if not bool(torch.isfinite(logits).all()):
                    raise ValueError("a logit of the model is not finite")
                found.update(logits, here["labels"])
    finally:
        model.train(was_training)
    return {name: float(value) for name, value in found.compute().items()}
