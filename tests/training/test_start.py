"""Where training starts: from the weights, or from codes calibrated on the training text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qat.config import ModelConfig, QuantConfig, TrainConfig
from qat.train import run


def test_a_run_starts_calibrated(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """On as many tokens as were asked for, in whole sequences; the result says so, and packed equals trained as ever."""
    config.model = replace(config.model, start="ptq", start_tokens=500)
    config.trainer = replace(config.trainer, max_steps=2)
    result = run(config)
    saved = json.loads((Path(result.folder) / "result.json").read_text())
    assert saved["calibration"]["tokens"] == 512 and 0 < saved["calibration"]["error"] < 1
    assert saved["status"] == "done" and saved["perplexity"]["packed"] == saved["perplexity"]["trained"]
    assert "calibrated start: 512 tokens of the training text in" in capsys.readouterr().out
    config.model, config.run.dir = replace(config.model, start="weights"), f"{config.run.dir}_weights"
    plain = run(config)
    assert not plain.calibration and plain.perplexity["converted"] != result.perplexity["converted"]


def test_a_start_that_cannot_be_is_refused_before_anything_is_loaded(config: TrainConfig) -> None:
    config.model, config.quant = replace(config.model, path="none", start="ptq"), QuantConfig(weight="binary")
    with pytest.raises(ValueError, match="model.start=ptq does not fit quant.weight=binary"):
        run(config)
    with pytest.raises(ValueError, match="model.start='gptq' is not allowed; choose one of weights, ptq"):
        ModelConfig(start="gptq")
