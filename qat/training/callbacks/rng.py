"""Random number generators in checkpoints: lightning saves none, so dropout would differ after a resume."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from qat.parallel import gathered, rank


def capture() -> dict[str, Any]:
    """States of python, numpy, torch and every CUDA device, as types that `torch.load(weights_only=True)` reads."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """The inverse of `capture`. CUDA states are restored where as many devices are present."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


class RandomState(pl.Callback):
    """Saves the generators with a checkpoint and restores them after the loaders, which draw a seed, were made."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Called by lightning when it saves: rank 0's, and those of the others."""
        everyone = gathered(capture())
        return {**everyone[0], "others": everyone[1:]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by lightning when it resumes."""
        self._loaded = state_dict

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The last moment before the first batch.

        Ranks draw other numbers for dropout, and nothing else: data and weights are those of the seed. A rank that the
        checkpoint does not know begins with numbers of its own.
        """
        loaded, self._loaded = self._loaded, None
        others = [] if loaded is None else loaded.get("others", [])
        if loaded is not None and rank() == 0:
            restore(loaded)
        elif len(others) >= rank() > 0:
            restore(others[rank() - 1])
        elif rank():
            torch.manual_seed(torch.initial_seed() + 1_000_003 * trainer.global_step + rank())
