"""Models whose code lies beside their weights: the run, what it leaves and every verb; and no code without trust."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import custom_code
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import qat
from qat import evaluate, generate
from qat.config import DataConfig, EvalConfig, ExportConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, TrainerConfig
from qat.formats.packed import folder as packed
from qat.models.any import load
from qat.models.hub import load_model
from qat.train import run

IDS = torch.arange(9)[None]


@pytest.fixture(scope="module")
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return custom_code.write(tmp_path_factory.mktemp("custom") / "tinyx", tiny_model)


@pytest.fixture
def exported(source: Path, tmp_path: Path) -> Path:
    model = load_model(ModelConfig(path=str(source), trust_remote_code=True))
    qat.convert(model)
    qat.pack(model)
    return packed.save(model, tmp_path / "packed", tokenizer=AutoTokenizer.from_pretrained(source))


def test_a_run_ends_and_leaves_what_can_be_loaded(source: Path, text_file: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        model=ModelConfig(path=str(source), trust_remote_code=True),
        data=DataConfig(train=str(text_file), sequence_length=16, batch_size=2),
        optim=OptimConfig(lr=1e-3),
        trainer=TrainerConfig(max_steps=2, accelerator="cpu", progress=False),
        eval=EvalConfig(max_tokens=64),
        export=ExportConfig(formats=["hf"]),
        run=RunConfig(dir=str(tmp_path / "run")),
    )
    result = run(config)
    assert result.status == "done" and result.export["done"] == ["hf"]
    for name in ("configuration_tinyx.py", "modeling_tinyx.py", "sizes_tinyx.py"):
        assert (tmp_path / "run/packed" / name).read_text() == (source / name).read_text()
    found = load(str(tmp_path / "run"), trust_remote_code=True)
    assert type(found.model).__name__ == "TinyXForCausalLM" and found.model.config.twist == 2.0
    assert type(load(str(tmp_path / "run/model"), trust_remote_code=True).model).__name__ == "TinyXForCausalLM"


def test_another_process_loads_it_without_the_source(exported: Path, tmp_path: Path) -> None:
    """With an empty cache of code, so that nothing but the folder can give it."""
    code = f"""
import torch, qat
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(exported)!r}, trust_remote_code=True, dtype=torch.float32)
print(type(model).__name__, model(torch.arange(9)[None]).logits.double().sum().item())
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(Path(qat.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    name, value = done.stdout.split() or [done.stderr, "0"]
    expected = packed.load(exported, trust_remote_code=True)(IDS).logits.double().sum().item()
    assert name == "TinyXForCausalLM" and float(value) == pytest.approx(expected, rel=1e-5)


def test_no_code_runs_and_nobody_is_asked_without_trust(
    exported: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QAT_TEST_CODE_RAN", str(tmp_path / "ran"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    commands = [
        lambda path: evaluate.main([path, "--text", "pydoc_data.topics", "--max-tokens", "32"]),
        lambda path: generate.main([path, "--prompt", "the"]),
    ]
    for path in (exported, source):
        for command in commands:
            assert command(str(path)) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and "--trust-remote-code" in said and str(path) in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["exported", "source"])
def test_verbs_take_the_flag(form: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(request.getfixturevalue(form))
    assert (
        evaluate.main([path, "--text", "pydoc_data.topics", "--max-tokens", "32", "--trust-remote-code", "--teacher", path]) == 0
    )
    assert generate.main([path, "--prompt", "the", "--max-new-tokens", "2", "--trust-remote-code"]) == 0


def test_export_takes_the_flag(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qat.export.__main__ import main

    command = [str(exported), "--format", "gguf", "--out", str(tmp_path / "x.gguf"), "--max-tokens", "64"]
    assert main(command) == 2 and "--trust-remote-code" in capsys.readouterr().err
    assert main([*command, "--trust-remote-code"]) == 2
    assert "tinyx" in capsys.readouterr().err.lower()  # loaded, and no architecture of GGUF


def test_a_map_without_code_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """Many models that transformers knows still carry the map of their first days."""
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    model.config.auto_map = {"AutoModelForCausalLM": "some/repo--modeling_llama.LlamaForCausalLM"}
    qat.convert(model)
    qat.pack(model)
    packed.save(model, tmp_path / "x")
    assert "auto_map" not in json.loads((tmp_path / "x/config.json").read_text())
    assert "auto_map" in vars(model.config)
    packed.load(tmp_path / "x")
