"""A teacher of another vocabulary is named, also where it has as many tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from qat.config import DistillConfig, ModelConfig, TrainConfig
from qat.training.trainings import load_teacher


def config(tiny_model: Path, teacher: Path) -> TrainConfig:
    return TrainConfig(model=ModelConfig(path=str(tiny_model), teacher=str(teacher)), distill=DistillConfig(hidden=1.0))


@pytest.fixture
def teacher(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "teacher"))


def test_the_same_words_in_another_order_are_refused(tiny_model: Path, teacher: Path) -> None:
    file = teacher / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(tokenizer))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match=r"but 2 of them are others: token 4 is 'b' to the teacher and 'a' to the student"):
        load_teacher(config(tiny_model, teacher), base)


def test_the_same_words_are_a_teacher_s(tiny_model: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert load_teacher(config(tiny_model, teacher), base) is not base
    assert "no tokenizer" not in capsys.readouterr().out
    for file in teacher.glob("tokenizer*"):
        file.unlink()
    assert load_teacher(config(tiny_model, teacher), base) is not None
    assert "has no tokenizer to compare" in capsys.readouterr().out
