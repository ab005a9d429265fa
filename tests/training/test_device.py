"""One answer to where a run computes."""

from __future__ import annotations

import pytest
import torch

from qat.config import TrainerConfig
from qat.training.fit import device_of


@pytest.mark.parametrize(
    ("accelerator", "cuda", "found"),
    [("auto", True, "cuda"), ("gpu", True, "cuda"), ("cpu", True, "cpu"), ("auto", False, "cpu"), ("gpu", False, "cpu")],
)
def test_only_cuda_and_the_cpu(monkeypatch: pytest.MonkeyPatch, accelerator: str, cuda: bool, found: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of(TrainerConfig(accelerator=accelerator)).type == found
