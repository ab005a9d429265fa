"""Perplexity over sliding windows, as pure functions: exp of the mean negative log-likelihood of the scored tokens.

Window i covers tokens [i * stride, i * stride + context). It scores the tokens that no earlier window covered, except the
first token of a window, which nothing in it predicts. So with stride == context windows do not overlap and each scores
context - 1 tokens; with stride < context every window after the first scores its last `stride` tokens. The last window is cut
at the end of the text and scored likewise. Windows are never padded, so per-tensor activation scales see real tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Window = tuple[Tensor, int]
Rows = tuple[list[float], int]


def windows(tokens: Tensor, context: int, stride: int | None = None, batch_size: int = 8) -> Iterator[Window]:
    """Batches (ids int64 [B, L], start): in each row the tokens from index `start` >= 1 on are scored.

    Raises:
        ValueError: tokens is not an integer vector of at least 2, or context, stride or batch_size is out of range.
    """
    stride = context if stride is None else stride
    _check(tokens, context, stride, batch_size)
    total, context = len(tokens), min(context, len(tokens))
    first, last = 0, (total - context) // stride  # the whole windows
    if stride < context:
        yield tokens[:context][None], 1
        first = 1
    start = max(context - stride, 1)
    for i in range(first, last + 1, batch_size):
        rows = range(i, min(i + batch_size, last + 1))
        yield torch.stack([tokens[j * stride : j * stride + context] for j in rows]), start
    rest = tokens[(last + 1) * stride :]
    if last * stride + context < total and len(rest) > start:
        yield rest[None], start


def _check(tokens: Tensor, context: int, stride: int, batch_size: int) -> None:
    if tokens.ndim != 1 or tokens.is_floating_point():
        raise ValueError(f"tokens must be an integer vector [T], not {tokens.dtype} {list(tokens.shape)}")
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens; perplexity needs at least 2")
    if context < 2 or not 1 <= stride <= context or batch_size < 1:
        raise ValueError(
            f"context={context}, stride={stride}, batch_size={batch_size} are not allowed: context must be at least 2,"
            " stride in 1 to context, batch_size at least 1"
        )


def log_likelihood(model: nn.Module, batches: Iterable[Window]) -> tuple[float, int]:
    """(negative log-likelihood in nats, scored tokens) of `windows`; float32 softmax, float64 sum.

    The model is put into eval mode and back. It may return logits [B, L, V] or an object with `.logits`.

    Raises:
        ValueError: the sum is NaN or infinite.
    """
    return likelihood([row_likelihoods(model, batches)])


def likelihood(parts: Iterable[Rows]) -> tuple[float, int]:
    """(negative log-likelihood, scored tokens) of all rows, added in their order.

    Raises:
        ValueError: the sum is NaN or infinite.
    """
    total, count = 0.0, 0
    for rows, scored in parts:
        count += scored
        for row in rows:
            total += row
    if not math.isfinite(total):
        raise ValueError(f"the negative log-likelihood of the text is {total}; the model's logits are not finite")
    return total, count


def row_likelihoods(model: nn.Module, batches: Iterable[Window]) -> Rows:
    """(negative log-likelihood of each row in nats, scored tokens) of `windows`; the model is put into eval mode and back."""
    found, count = list[float](), 0
    was_training, device = model.training, _device(model)
    model.eval()
    try:
        for ids, start in batches:
            logits = logits_of(model, ids.to(device))
            for row, targets in zip(logits, ids.to(device), strict=True):  # one row at a time: float32 logits are large
                nll = F.cross_entropy(row[start - 1 : -1].float(), targets[start:], reduction="sum")
                found.append(nll.double().item())
            count += ids[:, start:].numel()
    finally:
        model.train(was_training)
    return found, count


def scored_tokens(batches: Iterable[Window]) -> int:
    """How many tokens the windows score."""
    return sum(ids[:, start:].numel() for ids, start in batches)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B, L, V] of ids [B, L], without a key-value cache."""
    cached: Any = getattr(getattr(model, "config", None), "use_cache", None)
    output = model(ids) if cached is None else model(input_ids=ids, use_cache=False)
    return output if isinstance(output, Tensor) else output.logits


def _device(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def perplexity(model: nn.Module, tokens: Tensor, *, context: int, stride: int | None = None, batch_size: int = 8) -> float:
    """Perplexity of a causal language model on tokens int64 [T], in windows of `context` tokens (see the module's text).

    A text shorter than the context is one window. With `act_granularity="tensor"` the value depends on `batch_size`.

    Raises:
        ValueError: fewer than 2 tokens, context or stride out of range, or logits that are not finite.
    """
    total, count = log_likelihood(model, windows(tokens, context, stride, batch_size))
    return exp_mean(total, count)


def exp_mean(total: float, count: int) -> float:
    """exp(total / count); ValueError where that overflows."""
    try:
        return math.exp(total / count)
    except OverflowError:
        raise ValueError(f"perplexity is not finite: {total / count:g} nats a token") from None
