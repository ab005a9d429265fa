"""Several batches of several ranks: to the bit what one process gets that adds their gradients in the order of the strategy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from devices.pair import Pair
from several import assert_equal, both, tiny
from torch import Tensor

from qat.config import RunConfig
from qat.training.run import run

ORDERS = {"ddp": ((0, 2), (1, 3)), "fsdp2": ((0, 1), (2, 3))}
"""Strategy -> which of the four batches are added first; ranks take turns in the text."""


class InOrder(pl.Callback):
    """Of four batches' gradients the sums of two and two, and then their sum."""

    def __init__(self, strategy: str) -> None:
        self.pairs = ORDERS[strategy]
        self.found: list[list[Tensor]] = []

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.found.append([p.grad for p in parameters])  # type: ignore[misc]
        for parameter in parameters:
            parameter.grad = None
        if len(self.found) == 4:
            for i, parameter in enumerate(parameters):
                one, other = (self.found[a][i] + self.found[b][i] for a, b in self.pairs)
                parameter.grad = one + other
            self.found = []


def state(folder: Path) -> Any:
    found = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return {"weights": found["state_dict"], "moments": found["optimizer_states"][0]["state"]}


@pytest.mark.parametrize("strategy", ORDERS)
def test_equal_to_one_process_in_that_order(pair: Pair, still: Path, text_file: Path, tmp_path: Path, strategy: str) -> None:
    config = tiny(still, text_file, tmp_path / "run", strategy=strategy, accumulate_grad_batches=2, max_steps=6, val_every=None)
    two = state(both(pair, config))
    alone = replace(config, trainer=replace(config.trainer, strategy="auto", accumulate_grad_batches=4))
    for name, callbacks in {"order": {"order": {"_target_": f"{__name__}.InOrder", "strategy": strategy}}, "turn": {}}.items():
        run(replace(alone, run=RunConfig(name="tiny", dir=str(tmp_path / name)), callbacks=callbacks))
    assert_equal(two, state(tmp_path / "order"))
    weights = "student.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(two["weights"][weights], state(tmp_path / "turn")["weights"][weights])
