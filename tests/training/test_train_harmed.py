"""Training that was harmed: a killed run resumes to the bit, and what NaN, damage and a full disk leave can be gone on from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import killed_and_resumed, losses

from qat.config import OptimConfig, TrainConfig
from qat.config.compose.saved import load_config
from qat.train import run


@pytest.mark.parametrize("case", ["plain", "dropout, accumulation, lambda, validation"])
def test_resume_gives_the_same_losses_to_the_bit(config: TrainConfig, tmp_path: Path, case: str) -> None:
    if case != "plain":
        config.optim = replace(config.optim, lambda_steps=8, schedule="two_stage", weight_decay=0.1)
        config.trainer = replace(config.trainer, accumulate_grad_batches=2, val_every=5, val_batches=2)
    whole = Path(run(config).folder)
    parts = killed_and_resumed(config, tmp_path / "parts", step=7, checkpoint_every=5)
    assert losses(parts) == losses(whole)
    one, two = (json.loads((f / "result.json").read_text()) for f in (whole, parts))
    assert one["perplexity"] == two["perplexity"]
    assert one["tokens"] == two["tokens"]


def test_nan_stops_names_the_step_and_the_module_and_keeps_the_checkpoint(config: TrainConfig) -> None:
    config.optim = OptimConfig(lr=5e-3, optimizer={"_target_": "test_train_harmed.Poison", "at": 7})
    config.trainer = replace(config.trainer, checkpoint_every=2)
    with pytest.raises(ValueError, match=r"at step 8; first bad weight: model.layers.1.mlp.up_proj.weight"):
        run(config)
    folder = Path(config.run.dir or "")
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    assert json.loads((folder / "result.json").read_text())["status"].startswith("failed: ")


class Poison(torch.optim.AdamW):
    """AdamW that writes NaN into a late weight at one step."""

    def __init__(self, params: Any, at: int, **more: Any) -> None:
        super().__init__(params, **more)
        self.left = at

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        self.left -= 1
        if self.left == 0:
            self.param_groups[0]["params"][12].data[0, 0] = float("nan")
        return loss


def test_damaged_checkpoint_is_refused_by_name(config: TrainConfig) -> None:
    config.trainer = replace(config.trainer, max_steps=2)
    folder = Path(run(config).folder)
    checkpoint = folder / "checkpoints/last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"last.ckpt is damaged"):
        run(load_config(str(folder)))


def test_full_disk_leaves_the_last_good_checkpoint(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    config.trainer = replace(config.trainer, max_steps=4, checkpoint_every=2)
    original = TorchCheckpointIO.save_checkpoint

    def full(self: TorchCheckpointIO, checkpoint: dict[str, Any], path: Any, *more: Any) -> None:
        if checkpoint["global_step"] > 2:
            Path(path).write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        original(self, checkpoint, path, *more)

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        run(config)
    folder = Path(config.run.dir or "") / "checkpoints"
    assert [file.name for file in folder.iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_folder_is_not_overwritten(config: TrainConfig) -> None:
    config.trainer = replace(config.trainer, max_steps=1)
    run(config)
    with pytest.raises(ValueError, match="already holds a run; continue it with resume="):
        run(config)
    config.model = replace(config.model, path="/nowhere/at/all")  # said before a model is looked for
    with pytest.raises(ValueError, match="already holds a run; continue it with resume="):
        run(config)


def test_damaged_config_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("foo: [1")
    with pytest.raises(ValueError, match=r"config.yaml is damaged: while parsing"):
        load_config(str(tmp_path))
