"""A captured step: what it refuses, what lies in buffers, and that replays train as steps do. On a CPU they compute again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from qat.config import OptimConfig, TrainConfig
from qat.train import run
from qat.training import graph
from qat.training.graph.checks import check_graph, check_optimizer
from qat.training.graph.module import ReplayedModule
from qat.training.graph.step import WholeStep

GPU = torch.device("cuda")


def again(step: Callable[[], Any], passes: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], dict[str, Any]]:
    """As a graph does: nothing is computed yet, and each replay writes the same outputs."""
    outputs: dict[str, Any] = {}

    def replay() -> None:
        for name, value in step().items():
            outputs[name] = outputs[name].copy_(value) if name in outputs else value.clone()

    return replay, outputs


def graphed(config: TrainConfig, **trainer: Any) -> TrainConfig:
    config.trainer = replace(config.trainer, graph=True, **trainer)
    return config


def refused(config: TrainConfig, why: str, *callbacks: pl.Callback, device: torch.device = GPU) -> None:
    with pytest.raises(ValueError, match=rf"^trainer.graph=true is not possible here: .*{why}[^\n]*$"):
        check_graph(config, device, callbacks)


class Looks(pl.Callback):
    def on_before_optimizer_step(self, *_: Any) -> None:
        pass


def test_what_cannot_be_is_refused_with_the_reason(config: TrainConfig) -> None:
    config = graphed(config)
    check_graph(config, GPU, [pl.Callback()])
    refused(config, "needs a CUDA GPU", device=torch.device("cpu"))
    refused(config, "the callback Looks has on_before_optimizer_step", Looks())
    for key, values in {
        "data": {"kind": "chat"},
        "distill": {"kl_until": 0.5},
        "optim": {"damping": 0.1},
    }.items():
        refused(replace(config, **{key: replace(getattr(config, key), **values)}), "|".join(f"{key}.{name}" for name in values))
    for values in ({"devices": 2}, {"accumulate_grad_batches": 2}, {"precision": "16-mixed"}, {"activation_checkpointing": True}):
        refused(replace(config, trainer=replace(config.trainer, **values)), f"trainer.{next(iter(values))}")
    check_graph(replace(config, trainer=replace(config.trainer, graph=False)), torch.device("cpu"), [Looks()])


def test_a_run_on_a_cpu_is_refused_at_its_start(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="this run computes on a CPU"):
        run(graphed(config))


def test_optimizers_whose_steps_cannot_be_captured() -> None:
    weights = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="fused and capturable, such as torch.optim.AdamW, not SGD"):
        check_optimizer(torch.optim.SGD(weights, lr=0.1))


def test_a_step_is_captured_again_where_something_else_than_buffers_changes() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 0.5}], fused=True, weight_decay=0.0)
    factor = [1.0]

    def forward(batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (weight * batch["x"]).sum() * factor[0], {"seen": batch["x"].sum()}

    whole = WholeStep(forward, lambda: None, optimizer, lambda: tuple(factor), again)
    first = whole({"x": torch.ones(4)})
    second = whole({"x": torch.full((4,), 2.0)})
    assert whole.captures == 1 and first["seen"] == 4 and second["seen"] == 8  # copies, from buffers
    before = weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    whole({"x": torch.ones(4)})
    assert whole.captures == 1 and torch.equal(weight, before) and optimizer.param_groups[0]["lr"] == 0.0
    optimizer.param_groups[0]["lr"] = 0.5
    for change, captures in (
        (lambda: None, 1),
        (lambda: factor.__setitem__(0, 2.0), 2),
        (lambda: optimizer.param_groups[0].update(weight_decay=0.1), 3),
    ):
        change()
        whole({"x": torch.ones(4)})
        assert whole.captures == captures
    whole({"x": torch.ones(2, 4)})
    assert whole.captures == 4
    before = weight.detach().clone()
    whole({"x": torch.full((2, 4), float("inf"))})
    whole({"x": torch.ones(2, 4)})
    assert torch.equal(weight, before)  # held from the first loss on that is not finite


def test_replays_train_as_steps_do(config: TrainConfig, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with soft codes that become hard, clipping, rows, looks and validations in between."""
    fused = {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.95], "fused": True}
    rates = {"lr": 2**-8, "latent_lr_multiplier": 2.0, "schedule": "constant"}  # of float32, as those in buffers are
    config.optim = OptimConfig(**rates, anneal="soft", anneal_share=0.7, weight_decay=0.1, optimizer=fused)
    config.trainer = replace(config.trainer, max_steps=12, log_every_n_steps=4, val_every=6, monitor_every=5, samples=0)
    replays: list[int] = []

    def counted(step: Callable[[], Any], passes: Any, device: torch.device) -> Any:
        return again(lambda: replays.append(1) or step(), passes, device)  # type: ignore[func-returns-value]

    monkeypatch.setattr(ReplayedModule, "capture", staticmethod(counted))
    monkeypatch.setattr(graph, "check_graph", lambda *_: None)
    monkeypatch.setattr("qat.training.graph.module.check_optimizer", lambda optimizer: None)
    states, rows = [], []
    for on in (False, True):
        config.trainer = replace(config.trainer, graph=on)
        config.run = replace(config.run, dir=str(tmp_path / f"{on}"))
        run(config)
        states.append(torch.load(tmp_path / f"{on}/checkpoints/last.ckpt", weights_only=True))
        rows.append([line.split(",") for line in (tmp_path / f"{on}/metrics.csv").read_text().splitlines()])
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(states[1]["state_dict"][name], value), name
    kept = [i for i, name in enumerate(rows[0][0]) if name.startswith(("train/", "val/", "optim/"))]
    assert [[row[i] for i in kept] for row in rows[0]] == [[row[i] for i in kept] for row in rows[1]]
    assert len(replays) == 12 - 6  # but for the first, rows of 4, 8 and 12, and looks at 5 and 10
