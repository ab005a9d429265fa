"""Where training starts: from the pretrained weights, or from what calibration on the training text makes of them.

A calibrated start is worth its seconds only where little is trained. Its codes are a local optimum of each layer, with more
zeros than absmean's, and training leaves it slowly: from 3 tokens a parameter on, the weights themselves are as good a start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qat.calibration.latents import check_start, start_calibrated
from qat.calibration.norms import calibrate_norms
from qat.calibration.windows import batched, spread
from qat.config import TrainConfig
from qat.terminal.stage import stage


class Sequences(Protocol):
    """Training's sequences: `input_ids` int64 [L] each, and `attention_mask` where they are padded."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Tensor]: ...


def check_calibrated_start(config: TrainConfig) -> None:
    """ValueError for a quantizer that training cannot start calibrated with."""
    if config.model.start == "ptq":
        for quant in config.quant.variants():
            check_start(quant)


def calibrated(
    config: TrainConfig, base: nn.Module, student: nn.Module, sequences: Sequences, device: torch.device
) -> dict[str, Any]:
    """Calibrate the converted model on the training text where the configuration asks for it, in place; facts for the result.

    It is done on `device`; both models are left on the CPU.
    """
    wanted = {start_calibrated: config.model.start == "ptq", calibrate_norms: config.quant.rms_norm_start == "calibrated"}
    calibrate = next((one for one, is_wanted in wanted.items() if is_wanted), None)
    if calibrate is None:
        return {}
    windows = [ids.to(device) for ids in _windows(sequences, config.model.start_tokens)]
    with stage("calibrating the start"):
        facts = calibrate(base.to(device), student.to(device).eval(), windows)
    base.cpu(), student.cpu()
    print(f"calibrated start: {facts['tokens']:,} tokens of the training text in {facts['seconds']:.1f} s", flush=True)
    return facts


def _windows(sequences: Sequences, tokens: int) -> list[Tensor]:
    """Sequences spread over the text, without padding; all of them where there are fewer tokens."""
    length = len(sequences[0]["input_ids"])
    items = [sequences[i] for i in spread(len(sequences), min(-(-tokens // length), len(sequences)))]
    return batched([one["input_ids"][: int(one["attention_mask"].sum()) if "attention_mask" in one else None] for one in items])
