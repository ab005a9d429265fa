"""The main job on a tiny model: every stage, what may be switched on, and bad input."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TRAINER

from qat.config import ControlConfig, EvalConfig, ExportConfig, QuantConfig, TrainConfig
from qat.reporting.table import print_table
from qat.train import run


def test_a_whole_run(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config.export = ExportConfig(formats=["hf", "pt2"])
    config.eval = EvalConfig(texts={"other": config.data.train}, max_tokens=400)
    config.control = ControlConfig(enabled=True, lr=1e-3)
    config.trainer = replace(TRAINER, max_steps=60, val_every=30, checkpoint_every=25)
    result = run(config)
    folder = Path(result.folder)
    saved = json.loads((folder / "result.json").read_text())
    values = saved["perplexity"]
    assert values["full_precision"] > values["trained"] and values["converted"] > values["trained"]
    assert values["packed"] == values["trained"]
    assert values["exported"] == pytest.approx(values["packed"], rel=1e-3)
    assert values["control"] < values["full_precision"]
    other = saved["perplexity_other"]
    assert other["packed"] != values["packed"] and other["exported"] == pytest.approx(other["packed"], rel=1e-3)
    print_table(result)
    rows = {cells[1].strip(): cells[2:-1] for line in capsys.readouterr().out.splitlines() if len(cells := line.split("│")) > 2}
    own, gap, further = (cell.strip() for cell in rows["read back from the export"])
    assert [own, further] == [f"{text['exported']:,.3f}" for text in (values, other)]
    assert gap == f"{math.log(values['exported'] / values['full_precision']):+.3f}"
    assert all(cell.strip() for cells in rows.values() for cell in (cells[0], cells[2]))
    assert f"| perplexity, exported | {round(values['exported'], 4):.6g} |" in (folder / "model/README.md").read_text()
    assert (values["context"], values["stride"], values["text"]) == (32, 32, "last 10 % of text.txt")
    assert saved["export"] == {"done": ["hf", "pt2"], "skipped": {}}
    assert saved["verification"]["pt2"]["perplexity"] == values["packed"]
    assert saved["verification"]["pt2"]["further"] == {"other": other["packed"]}
    assert saved["tokens"] == 60 * 4 * 32 and saved["tokens_per_second"] > 0
    assert len(saved["conversion"]["converted"]) == 14 and "tied" in saved["conversion"]["skipped"]["lm_head"]
    assert saved["bytes"]["packed_linears"] < saved["bytes"]["packed_model"] < saved["bytes"]["full_precision_bf16"]
    assert saved["status"] == "done" and saved["versions"]["torch"] == torch.__version__
    for name in (
        "config.yaml",
        "metrics.csv",
        "checkpoints/last.ckpt",
        "packed/model.safetensors",
        "model/config.json",
        "model.pt2",
        "samples.md",
    ):
        assert (folder / name).is_file(), name
    content = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 60
    assert all(v.dtype == torch.float32 for v in content["state_dict"].values())


def test_channel_scales_train_and_the_export_says_why_it_is_skipped(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config.quant = QuantConfig(granularity="channel", scale_dtype="float16")
    config.export = ExportConfig(formats=["hf", "gguf"], layout="base3")
    result = run(config)
    assert result.export["done"] == [] and "quant.granularity=channel" in result.export["skipped"]["hf"]
    assert "WordLevel tokenizer" in result.export["skipped"]["gguf"]
    before, _, _ = capsys.readouterr().out.partition("perplexity full precision")
    for name, reason in result.export["skipped"].items():
        assert f"warning: export.formats={name} will not be written: {reason}" in before
    assert "exported" not in result.perplexity
    assert result.perplexity["packed"] == result.perplexity["trained"]


def test_bf16_mixed_keeps_latent_weights_in_float32(config: TrainConfig) -> None:
    config.trainer = replace(TRAINER, precision="bf16-mixed", max_steps=3, activation_checkpointing=True)
    result = run(config)
    content = torch.load(Path(result.folder) / "checkpoints/last.ckpt", weights_only=True)
    assert {v.dtype for v in content["state_dict"].values()} == {torch.float32}
    assert {v.dtype for s in content["optimizer_states"][0]["state"].values() for v in s.values()} == {torch.float32}
    assert result.perplexity["packed"] == result.perplexity["trained"]


def test_data_is_opened_before_the_model(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.models.hub.load_model", lambda *_: pytest.fail("the model was loaded"))
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "good"}\n{"text": "half \\ud83d"}\n')
    for change in ({"train": str(file)}, {"valid": str(file)}):
        with pytest.raises(ValueError, match=r"bad.jsonl:2: the field 'text' holds half of a surrogate pair"):
            run(replace(config, data=replace(config.data, **change)))
    with pytest.raises(ValueError, match=r"bad.jsonl:2"):
        run(replace(config, eval=replace(config.eval, texts={"further": str(file)})))


def test_dry_run_writes_nothing(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config.dry_run = True
    run(config)
    output = capsys.readouterr().out
    assert "14 of 15 linear layers converted" in output and "12 updates of 128 tokens, 1,536 tokens" in output
    assert re.search(r"^epochs +[\d.]+: \d+ sequences in all$", output, re.M) and re.search(r"^sample +.\[\[", output, re.M)
    assert not Path(config.run.dir or "").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"path": "/nowhere/model"}}, "/nowhere/model"),
        ({"data": {"train": "/nowhere/text.txt"}}, "/nowhere/text.txt"),
        ({"trainer": {"precision": "16-mixed"}}, "bf16-mixed"),
        ({"trainer": {"accelerator": "gpu"}}, "no CUDA GPU"),
        ({"trainer": {"devices": 2}}, "trainer.devices=2: several devices need a process each, .*torchrun --standalone"),
        ({"model": {"teacher": "off"}}, "needs a teacher"),
        ({"optim": {"lambda_steps": 100}}, "lambda_steps=100 is above trainer.max_steps=12"),
        ({"quant": {"granularity": "group", "group_size": 5}}, "model.layers.0.self_attn.q_proj.*not a multiple"),
        ({"model": {"exclude": ["*"]}}, "check include and exclude"),
        ({"optim": {"optimizer": {"_target_": "torch.optim.Nothing"}}}, "torch.optim.Nothing"),
    ],
)
def test_bad_input_is_one_clear_error(config: TrainConfig, change: dict[str, dict[str, Any]], words: str) -> None:
    if "trainer" in change and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so the setting is allowed")
    for section, values in change.items():
        setattr(config, section, replace(getattr(config, section), **values))
    with pytest.raises(ValueError, match=words):
        run(config)


def test_wandb_offline_and_tensorboard_log(config: TrainConfig) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    config.logger = {
        "wandb": {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "qat", "offline": True},
        "tensorboard": {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "name": "", "version": "tensorboard"},
    }
    config.trainer = replace(config.trainer, max_steps=2)
    folder = Path(run(config).folder)
    assert list(folder.glob("wandb/offline-run-*/*.wandb")) and list(folder.glob("tensorboard/events.*"))


def test_compiled_training_packs_the_eager_student(config: TrainConfig) -> None:
    config.trainer = replace(TRAINER, max_steps=2, compile=True)
    result = run(config)
    assert result.perplexity["packed"] == result.perplexity["trained"]
