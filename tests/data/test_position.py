"""A killed run goes on with the same batches."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import PreTrainedTokenizerFast

from qat.config import DataConfig
from qat.data import build_datamodule


class Recorder(lightning.LightningModule):
    """Writes down every batch it trains on; raises before batch `die_at`."""

    def __init__(self, die_at: int | None = None) -> None:
        super().__init__()
        self.layer, self.die_at, self.seen = torch.nn.Linear(1, 1), die_at, []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == self.die_at:
            raise RuntimeError("killed")
        self.seen.append((batch_idx, batch["input_ids"].tolist(), torch.rand(1).item()))
        return self.layer(batch["input_ids"].float().mean().view(1, 1)).sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fit(module: Recorder, data: DataConfig, tokenizer: PreTrainedTokenizerFast, folder: Path, resume: Path | None = None):
    trainer = lightning.Trainer(
        max_steps=12, accumulate_grad_batches=3, val_check_interval=12, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
    )  # fmt: skip
    trainer.fit(
        module, datamodule=build_datamodule(data, tokenizer, seed=5, total_batches=36), ckpt_path=resume, weights_only=True
    )
    return trainer


@pytest.mark.parametrize("saved", [5, 8, 11])  # in mid epoch, at a validation, before the end
def test_a_killed_run_resumes_with_the_same_batches(saved, data, tokenizer, tmp_path) -> None:
    torch.manual_seed(0)
    whole = Recorder()
    fit(whole, data, tokenizer, tmp_path / "whole")
    assert [index for index, _, _ in whole.seen] == list(range(36))

    torch.manual_seed(0)
    killed = Recorder(die_at=saved * 3 + 1)  # one batch into the next accumulation
    with pytest.raises(RuntimeError, match="killed"):
        fit(killed, data, tokenizer, tmp_path / "killed")
    rest = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")
        trainer = fit(rest, data, tokenizer, tmp_path / "killed", resume=tmp_path / "killed" / f"step={saved}.ckpt")
    assert trainer.global_step == 12
    assert [s[:2] for s in rest.seen] == [s[:2] for s in whole.seen[saved * 3 :]]
    end = torch.load(tmp_path / "killed" / "step=12.ckpt", weights_only=True)["QATData"]
    assert end == {"sequences": 12 * 3 * 2, "step": 12}  # counted on from the restored position


def test_loaders_leave_the_global_random_numbers_alone(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    module = build_datamodule(data, tokenizer, total_batches=3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(iter(module.train_dataloader())), next(iter(module.val_dataloader()))
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_holds_the_position(data, tokenizer, tmp_path) -> None:
    fit(Recorder(), data, tokenizer, tmp_path)
    state = torch.load(tmp_path / "step=7.ckpt", weights_only=True)["QATData"]
    assert state == {"sequences": 7 * 3 * 2, "step": 7}
    module = build_datamodule(data, tokenizer, seed=5, total_batches=36)
    module.load_state_dict(state)
    assert module.state_dict() == state and len(list(module.train_dataloader())) == 36 - 21
