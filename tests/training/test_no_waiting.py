"""Steps that write no row read no value from their device: not in the model, its losses, clipping, the optimizer or callbacks.

On a CPU nothing waits, so here its tensors are taken for a device's, and a mode refuses the ops that read one.
"""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qat.config import DistillConfig, OptimConfig, TrainConfig
from qat.parallel import waiting
from qat.train import run
from qat.training import run as running
from qat.training.callbacks import NonFiniteError, guard

FUSED = {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.95], "fused": True}
HERE = ("__next__", "on_before_batch_transfer", "read", "_save")
"""Functions that read what is on the CPU, batches before they are moved and what was sent and has come (`waiting.Sent`); and
the one that writes a checkpoint."""
READS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal.default", "item")


class Refusing(TorchDispatchMode):
    """Notes the ops that read a value, between `begin` and `end`."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.found, self.steps = False, list[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.on and any(f"aten.{name}" in str(func) for name in READS):
            stack = traceback.extract_stack()[:-1]
            if not any(frame.name in HERE for frame in stack):
                self.found.append(f"{func} {''.join(traceback.format_list(stack[-14:]))}")
        return func(*args, **(kwargs or {}))


class First(pl.Callback):
    """Begins before everybody's part of a step that writes nothing."""

    def __init__(self, mode: Refusing, every: int) -> None:
        self.mode, self.every = mode, every

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.mode.on = (trainer.global_step + 1) % self.every != 0 and trainer.global_step > 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.mode.steps += self.mode.on


class Last(pl.Callback):
    """Ends at what writes; what lightning does between two steps is in the first of them."""

    def __init__(self, mode: Refusing) -> None:
        self.mode = mode

    def on_train_end(self, *_: Any) -> None:
        self.mode.on = False

    on_validation_start = on_save_checkpoint = on_train_end


def as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "waits", lambda x: True)


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Refusing:
    """In every training that is run."""
    found = Refusing()
    as_device(monkeypatch)
    original = pl.Trainer.__init__

    def made(self: Any, *args: Any, callbacks: Any, **more: Any) -> None:
        original(self, *args, callbacks=[First(found, more["log_every_n_steps"]), *callbacks, Last(found)], **more)

    monkeypatch.setattr(pl.Trainer, "__init__", made)
    return found


def quiet(config: TrainConfig, **distill: Any) -> TrainConfig:
    """Nothing is written within a run of 12 steps but the rows of steps 5 and 10."""
    config.trainer = replace(config.trainer, max_steps=12, log_every_n_steps=5, val_every=None, monitor_every=None, samples=0)
    config.optim = OptimConfig(lr=5e-3, warmup_steps=2, optimizer=FUSED)
    config.distill = DistillConfig(**distill)
    return config


@pytest.mark.parametrize(
    "distill",
    [
        {"ce": 0.5, "kl": 0.5},
        {"ce": 0.5, "kl": 0.5, "hidden": 0.1, "cosine": 0.1, "relation": 0.1},
        {"ce": 0.5, "kl": 0.5, "kl_chunk": 7},
    ],
    ids=["logits", "states", "chunks"],
)
def test_a_step_reads_nothing(config: TrainConfig, mode: Refusing, distill: dict[str, float]) -> None:
    with mode:
        run(quiet(config, **distill))
    assert mode.steps >= 8 and not mode.found, "\n\n".join(dict.fromkeys(mode.found))


def test_chats_of_many_lengths_read_nothing(chats: TrainConfig, mode: Refusing) -> None:
    """Padding, and words that are not predicted."""
    with mode:
        run(quiet(chats, ce=0.5, kl=0.5, hidden=0.1))
    assert mode.steps >= 8 and not mode.found, "\n\n".join(dict.fromkeys(mode.found))


def test_a_callback_that_reads_is_found(config: TrainConfig, mode: Refusing) -> None:
    class Reader(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
            next(module.parameters()).sum().item()

    config = quiet(config, ce=1.0)
    with mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "callbacks", lambda config: [Reader()])
        run(config)
    assert mode.found and all("Reader" in one or "on_before_zero_grad" in one for one in mode.found)


class Harm(pl.Callback):
    """What a layer gives is not a number from a step on."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 6:
            layer = module.student.get_submodule("model.layers.1.mlp.up_proj")
            layer.register_forward_hook(lambda module, args, output: output * float("nan"))


def test_a_bad_loss_is_told_of_the_step_and_leaves_the_weights(
    config: TrainConfig, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is where the loss is waited for."""
    monkeypatch.setattr(running, "callbacks", lambda config: [Harm()])
    found = []
    for late in (False, True):
        if late:
            as_device(monkeypatch)
        weights: list[Any] = []
        original = guard._stop

        def stop(module: Any, *rest: Any) -> None:
            weights.extend(p.detach().clone() for p in module.student.parameters())  # noqa: B023
            original(module, *rest)  # noqa: B023

        with monkeypatch.context() as patch, pytest.raises(NonFiniteError) as error:
            patch.setattr(guard, "_stop", stop)
            config.run = replace(config.run, dir=str(tmp_path / f"{late}"))
            run(quiet(config, ce=1.0))
        assert error.value.step == 7
        found.append((str(error.value), weights))
    assert found[0][0] == found[1][0] and "nan at step 7" in found[0][0] and "mlp.up_proj" in found[0][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
