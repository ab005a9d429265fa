"""Warnings of transformers reach people, each once and on one line, but for those that we answer ourselves."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest

from qat.config import ModelConfig
from qat.formats import upstream
from qat.models.hub import load_model


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    upstream._LISTENER.said.clear()


def test_each_warning_is_one_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    upstream.listen()
    upstream.listen()
    for name in ("transformers.models.x", "huggingface_hub.y"):
        for _ in range(3):
            logging.getLogger(name).warning("the config\n  is   odd: %s", name)
    logging.getLogger("transformers.z").warning("long " * 200)
    logging.getLogger("transformers.z").info("nothing")
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "qat: transformers: the config is odd: transformers.models.x"
    assert second == "qat: huggingface_hub: the config is odd: huggingface_hub.y" and len(third) < 430


def test_what_we_say_ourselves_is_not_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    upstream.listen()
    logging.getLogger("transformers.utils").warning("LlamaForCausalLM LOAD REPORT from: x\nKey | Status")
    logging.getLogger("transformers.tokenization").warning("Token indices sequence length is longer than the maximum")
    assert capsys.readouterr().err == ""


def test_warnings_come_through_where_bars_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    upstream.listen()
    with upstream.no_bars():
        print("0%|     |", file=sys.stderr)
        logging.getLogger("transformers.gguf").warning("odd")
    assert capsys.readouterr().err == "qat: transformers: odd\n"


def test_a_config_that_transformers_wonders_at_is_said(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "x")
    file = tmp_path / "x/config.json"
    rope = {"rope_type": "default", "rope_theta": 1e4, "strange": 1}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_parameters": rope}))
    load_model(ModelConfig(path=str(tmp_path / "x")))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qat: transformers: ")]
    assert len(said) == 1 and "strange" in said[0]
