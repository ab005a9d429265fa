"""A checkpoint's file: damage of every kind is noticed, and the one before it is taken."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qat.training import checkpoints


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    """last.ckpt of step 2 and previous.ckpt of step 1."""

    class Connector:
        step = 0

        def dump_checkpoint(self, weights_only: bool) -> dict[str, Any]:
            self.step += 1
            return {"global_step": self.step, "weights": torch.arange(1000.0)}

    trainer: Any = SimpleNamespace(_checkpoint_connector=Connector())
    for _ in range(2):
        checkpoints.save(trainer, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_every_flipped_bit_is_noticed(two_checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoints.newest(two_checkpoints) == checkpoints.Found(two_checkpoints / "last.ckpt", 2)
    whole = (two_checkpoints / "last.ckpt").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(whole) - checkpoints._COMMENT, (60,), generator=generator).tolist():
        (two_checkpoints / "last.ckpt").write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert checkpoints.newest(two_checkpoints) == checkpoints.Found(two_checkpoints / "previous.ckpt", 1)
    checkpoints.newest(two_checkpoints, say=True)
    said = capsys.readouterr().out
    assert "last.ckpt is damaged" in said and said.endswith("going on from previous.ckpt, step 1\n")


def test_files_of_earlier_versions_are_checked_by_their_own_sums(tmp_path: Path) -> None:
    torch.save({"global_step": 3, "weights": torch.arange(1000.0)}, tmp_path / "last.ckpt")
    assert checkpoints.newest(tmp_path) == checkpoints.Found(tmp_path / "last.ckpt", 3)
    content = bytearray((tmp_path / "last.ckpt").read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 777] ^= 1
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="last.ckpt is damaged"):
        checkpoints.newest(tmp_path)


def test_a_record_of_another_size_is_noticed_with_right_sums(tmp_path: Path) -> None:
    torch.save({"global_step": 3, "weights": torch.arange(1000.0)}, tmp_path / "whole")
    with zipfile.ZipFile(tmp_path / "whole") as archive, zipfile.ZipFile(tmp_path / "last.ckpt", "w") as written:
        for name in archive.namelist():
            written.writestr(name, archive.read(name)[: 400 if name.endswith("/data/0") else None])
    with pytest.raises(ValueError, match="last.ckpt is damaged"):
        checkpoints.newest(tmp_path)


def test_a_device_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="it is no file"):
        checkpoints.newest(tmp_path)
