"""Callbacks that people expect, by name; checkpoints of others written whole; the attention that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.plugins.io import TorchCheckpointIO

from qat.config import ModelConfig
from qat.config.compose.composing import compose_run
from qat.models.hub import load_model
from qat.training.checkpoints import WholeFiles
from qat.training.plugins import callbacks

NAMES = {
    "early_stopping": "EarlyStopping",
    "best": "ModelCheckpoint",
    "lr_monitor": "LearningRateMonitor",
    "device_stats": "DeviceStatsMonitor",
}


def test_callbacks_by_name_and_several_at_once() -> None:
    for name, kind in NAMES.items():
        found = callbacks(compose_run(["model.path=m", "data.train=t", f"callbacks={name}"]))
        assert [type(one).__name__ for one in found] == [kind]
    both = compose_run(["model.path=m", "data.train=t", "callbacks=[early_stopping,best]", "callbacks.best.save_top_k=3"])
    early, best = callbacks(both)
    assert (early.monitor, early.patience, best.save_top_k) == ("val/ce", 3, 3)  # type: ignore[attr-defined]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "best.ckpt"
    WholeFiles().save_checkpoint({"a": 1}, file)
    before = file.read_bytes()

    def full(self: Any, checkpoint: Any, path: Path, storage_options: Any = None) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space"):
        WholeFiles().save_checkpoint({"a": 2}, file)
    assert file.read_bytes() == before and [one.name for one in file.parent.iterdir()] == ["best.ckpt"]


def test_attention_is_computed_as_asked_or_refused(tiny_model: Path) -> None:
    for name in ("eager", "sdpa"):
        assert load_model(ModelConfig(str(tiny_model), attn_implementation=name)).config._attn_implementation == name
    with pytest.raises(ValueError, match=r"model.attn_implementation=no_such_thing cannot be used|does not fit"):
        load_model(ModelConfig(str(tiny_model), attn_implementation="no_such_thing"))
