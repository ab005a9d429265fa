"""Ranks work on the same data and the same model: files of one name on several machines may differ, and nothing would show it.

What would follow is a run whose ranks draw from different texts, or a teacher that differs from rank to rank.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat import parallel
from qat.config import TrainerConfig
from qat.data.mixture import Mixture

_BLOCK = 1 << 22


def same_data(data: Any) -> None:
    """Raise ValueError on all ranks where they have read different texts; None, data that is yet to be sampled, is equal."""
    if parallel.size() > 1:
        parts = [] if data is None else [*(data.train.parts if isinstance(data.train, Mixture) else [data.train]), data.valid]
        parallel.same([_described(part) for part in parts], "training or validation texts")


def same_texts(scored: Any) -> None:
    """The same of what is measured: tensors in dicts, lists and tuples."""
    if parallel.size() > 1:
        parallel.same(_digest(scored), "texts to be evaluated")


def same_model(model: nn.Module, what: str = "models") -> None:
    """The same of weights, by the sum of each."""
    if parallel.size() > 1:
        sums = torch.stack([parameter.detach().sum(dtype=torch.float64).cpu() for parameter in model.parameters()])
        parallel.same(f"{len(sums)} parameters, {_digest(sums)}", what)


def _described(part: Any) -> str:
    tokens = part.tokens() if callable(part.tokens) else part.tokens
    return f"{len(part)} of {len(tokens)} tokens, {_digest([tokens, getattr(part, 'labels', ())])}"


def _digest(value: Any) -> str:
    found = hashlib.sha256()
    _fed(found, value)
    return found.hexdigest()[:12]


def _fed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        _fed(digest, [*value.items()])
    elif isinstance(value, list | tuple):
        for one in value:
            _fed(digest, one)
    elif isinstance(value, Tensor | np.ndarray):
        flat = (value.detach().cpu().numpy() if isinstance(value, Tensor) else value).reshape(-1)
        for start in range(0, len(flat), _BLOCK):
            digest.update(np.ascontiguousarray(flat[start : start + _BLOCK]).tobytes())
    else:
        digest.update(repr(value).encode())


def use_threads(trainer: TrainerConfig) -> None:
    """torch's threads of this process: as many as asked for; where several share a machine and nobody said, its part of them."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if parallel.size() > 1 else 1
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    elif here > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // here, 1))
