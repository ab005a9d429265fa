"""The main job on a tiny model: every stage, exact resume after a kill, interruption, and bad input."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.config import (
    ControlConfig,
    DataConfig,
    DistillConfig,
    EvalConfig,
    ExportConfig,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
    TrainerConfig,
)
from qat.config.compose.saved import load_config
from qat.reporting.result import Perplexity, recovered
from qat.reporting.table import _recovered, print_table
from qat.train import main, run

ROOT = Path(__file__).resolve().parents[2]
TRAINER = TrainerConfig(max_steps=12, accelerator="cpu", progress=False, log_every_n_steps=1, threads=1)


@pytest.fixture
def config(tiny_model: Path, text_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=str(tiny_model)),
        data=DataConfig(train=str(text_file), sequence_length=32, batch_size=4, valid_fraction=0.1),
        distill=DistillConfig(ce=0.5, kl=0.5),
        optim=OptimConfig(lr=5e-3, warmup_steps=2),
        trainer=replace(TRAINER),
        export=ExportConfig(formats=[]),
        run=RunConfig(name="tiny", dir=str(tmp_path / "run")),
    )


def losses(folder: Path) -> dict[int, str]:
    with (folder / "metrics.csv").open() as lines:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(lines) if row["train/loss"]}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qat.train", *arguments]


def overrides(config: TrainConfig, folder: Path, **more: Any) -> list[str]:
    data = {
        "model.path": config.model.path,
        "data.train": config.data.train,
        "data.sequence_length": 32,
        "data.batch_size": 4,
        "data.valid_fraction": 0.1,
        "optim.lr": 5e-3,
        "trainer.log_every_n_steps": 1,
        "trainer.threads": 1,
        "trainer.progress": "false",
        "export.formats": "[]",
        "run.dir": folder,
        **more,
    }
    return [f"{key}={value}" for key, value in data.items()]


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
    assert [f"{text['exported']:,.3f}" for text in (values, other)] == [
        cell.strip() for cell in rows["read back from the export"]
    ]
    assert all(cell.strip() for cells in rows.values() for cell in cells)
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


@pytest.mark.parametrize("case", ["plain", "dropout, accumulation, lambda, validation"])
def test_resume_gives_the_same_losses_to_the_bit(config: TrainConfig, tmp_path: Path, case: str) -> None:
    if case != "plain":
        config.optim = replace(config.optim, lambda_steps=8, schedule="two_stage", weight_decay=0.1)
        config.trainer = replace(config.trainer, accumulate_grad_batches=2, val_every=5, val_batches=2)
    whole = Path(run(config).folder)
    config.run = RunConfig(name="tiny", dir=str(tmp_path / "parts"))
    config.trainer = replace(config.trainer, checkpoint_every=5)
    stop_after(config, 7)
    parts = tmp_path / "parts"
    run(load_config(str(parts)))
    assert losses(parts) == losses(whole)
    one, two = (json.loads((f / "result.json").read_text()) for f in (whole, parts))
    assert one["perplexity"] == two["perplexity"]
    assert one["tokens"] == two["tokens"]


def stop_after(config: TrainConfig, step: int) -> None:
    """Die at a step as a killed process would: no checkpoint is written on the way out."""
    import lightning.pytorch as pl

    class Killed(BaseException):
        pass

    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == step:
                raise Killed

    original = pl.Trainer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pl.Trainer, "__init__", lambda self, *a, callbacks, **k: original(self, *a, callbacks=[*callbacks, Kill()], **k)
        )
        with pytest.raises(Killed):
            run(config)


def started(arguments: list[str], awaited: Path) -> subprocess.Popen[str]:
    """The command line in a process of its own, once it has written the file `awaited`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not awaited.exists():
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.05)
    return process


def test_killed_process_resumes_from_the_command_line(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    arguments = overrides(config, folder, **{"trainer.max_steps": 400, "trainer.checkpoint_every": 3})
    process = started(arguments, folder / "checkpoints/last.ckpt")
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    more = str(step + 5)
    again = command(f"resume={folder}", f"trainer.max_steps={more}")
    done = subprocess.run(again, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(folder)) == list(range(1, step + 6))
    assert json.loads((folder / "result.json").read_text())["status"] == "done"


def test_ctrl_c_keeps_a_checkpoint_and_a_readable_result(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "interrupted"
    arguments = overrides(config, folder, **{"trainer.max_steps": 5000})
    process = started(arguments, folder / "metrics.csv")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    result = json.loads((folder / "result.json").read_text())
    step = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert result["status"].startswith(f"interrupted at step {step}; continue with resume=")
    assert result["perplexity"]["full_precision"] > 1 and "trained" not in result["perplexity"]
    assert "full precision" in output


def test_channel_scales_train_and_the_export_says_why_it_is_skipped(config: TrainConfig) -> None:
    config.quant = QuantConfig(granularity="channel", scale_dtype="float16")
    config.export = ExportConfig(formats=["hf", "gguf"], layout="base3")
    result = run(config)
    assert result.export["done"] == [] and "quant.granularity=channel" in result.export["skipped"]["hf"]
    assert "WordLevel tokenizer" in result.export["skipped"]["gguf"]
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
    assert "14 of 15 linear layers converted" in output and "1,536 in 12 steps of 128" in output
    assert re.search(r"^epochs +[\d.]+: \d+ sequences in all$", output, re.M) and re.search(r"^sample +.\[\[", output, re.M)
    assert not Path(config.run.dir or "").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"path": "/nowhere/model"}}, "/nowhere/model"),
        ({"data": {"train": "/nowhere/text.txt"}}, "/nowhere/text.txt"),
        ({"trainer": {"precision": "16-mixed"}}, "bf16-mixed"),
        ({"trainer": {"accelerator": "gpu"}}, "no CUDA GPU"),
        ({"trainer": {"devices": 2}}, "trainer.devices=2, trainer.num_nodes=1: allowed is 1 of each"),
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


def test_nan_stops_names_the_step_and_the_module_and_keeps_the_checkpoint(config: TrainConfig) -> None:
    config.optim = OptimConfig(lr=5e-3, optimizer={"_target_": "test_train.Poison", "at": 7})
    config.trainer = replace(config.trainer, checkpoint_every=2)
    with pytest.raises(ValueError, match=r"at step 8; first bad weight: model.layers.1.mlp.up_proj.weight"):
        run(config)
    folder = Path(config.run.dir or "")
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    assert json.loads((folder / "result.json").read_text())["status"].startswith("failed: ")


class Poison(torch.optim.AdamW):
    """AdamW that writes NaN into a late weight at one step."""

    def __init__(self, params: Any, at: int, **more: Any) -> None:
        super().__init__(params, **more)
        self.left = at

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        self.left -= 1
        if self.left == 0:
            self.param_groups[0]["params"][12].data[0, 0] = float("nan")
        return loss


def test_damaged_checkpoint_is_refused_by_name(config: TrainConfig) -> None:
    config.trainer = replace(config.trainer, max_steps=2)
    folder = Path(run(config).folder)
    checkpoint = folder / "checkpoints/last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"last.ckpt is damaged"):
        run(load_config(str(folder)))


def test_full_disk_leaves_the_last_good_checkpoint(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning.pytorch as pl

    config.trainer = replace(config.trainer, max_steps=4, checkpoint_every=2)
    original = pl.Trainer.save_checkpoint

    def full(self: pl.Trainer, path: Any, *more: Any) -> None:
        if self.global_step > 2:
            Path(path).write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        original(self, path, *more)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        run(config)
    folder = Path(config.run.dir or "") / "checkpoints"
    assert [file.name for file in folder.iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_folder_is_not_overwritten(config: TrainConfig) -> None:
    config.trainer = replace(config.trainer, max_steps=1)
    run(config)
    with pytest.raises(ValueError, match="already holds a run; continue it with resume="):
        run(config)
    config.model = replace(config.model, path="/nowhere/at/all")  # said before a model is looked for
    with pytest.raises(ValueError, match="already holds a run; continue it with resume="):
        run(config)


def test_multirun_writes_one_folder_a_job(config: TrainConfig, tmp_path: Path) -> None:
    arguments = overrides(config, tmp_path / "sweep", **{"trainer.max_steps": 1, "quant.granularity": "tensor,channel"})
    done = subprocess.run(command("-m", *arguments), env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    granularity = [load_config(str(tmp_path / "sweep" / job)).quant.granularity for job in ("0", "1")]
    assert granularity == ["tensor", "channel"]


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


def test_piped_output_is_lines_and_ends_with_the_table(config: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    progress = {"trainer.progress": "true", "trainer.max_steps": 20, "logger": "wandb"}
    arguments = overrides(config, tmp_path / "piped", **progress)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == f"run        {tmp_path / 'piped'} (done)", done.stdout
    table = max(i for i, line in enumerate(lines) if line.startswith("┏"))
    wandb = [i for i, line in enumerate(lines) if line.startswith("wandb")]
    assert wandb and max(wandb) < table
    steps = [line for line in lines if line.startswith("QAT")]
    assert len(steps) == 10 and steps[-1].startswith("QAT step 20/20, loss ") and steps[-1].endswith(" tokens/s, 0:00 left")
    assert "\r" not in done.stdout and not any(line == "" and i < table for i, line in enumerate(lines)), done.stdout


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--foo", "unrecognized arguments: --foo. Allowed: --help, --dry-run, -m"),
        ("--trainer.max_steps=5", "settings have no dashes: trainer.max_steps=5"),
        ("--cfg=nothing", "invalid choice: 'nothing'"),
    ],
)
def test_an_unknown_flag_is_one_line(capsys: pytest.CaptureFixture[str], flag: str, words: str) -> None:
    for arguments in ([flag], ["recipe=quickstart", flag]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith("qat.train: ") and words in shown.err and shown.err.count("\n") == 1


def test_resume_takes_no_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["resume=somewhere", "-m"])
    assert "-m does not go with resume=" in capsys.readouterr().err


def test_recovered_share() -> None:
    shares = recovered({"full_precision": math.e, "converted": math.e**5, "trained": math.e**2})
    assert shares["recovered_share"] == pytest.approx(0.75) and shares["log_ratio_trained"] == pytest.approx(1.0)


@pytest.mark.parametrize(("trained", "said"), [(math.e**2, "75.0% of the log"), (1.0, "more than the log")])
def test_more_than_all_is_said_in_words(trained: float, said: str) -> None:
    values = {"full_precision": math.e, "converted": math.e**5, "trained": trained}
    (line,) = _recovered(Perplexity("my text", 100, 16, 16, values))
    assert said in line and f"ln(trained / full precision) = {math.log(trained) - 1:.3f}" in line


def test_compiled_training_packs_the_eager_student(config: TrainConfig) -> None:
    config.trainer = replace(TRAINER, max_steps=2, compile=True)
    result = run(config)
    assert result.perplexity["packed"] == result.perplexity["trained"]


def test_damaged_config_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("foo: [1")
    with pytest.raises(ValueError, match=r"config.yaml is damaged: while parsing"):
        load_config(str(tmp_path))
