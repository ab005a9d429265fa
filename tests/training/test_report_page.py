"""Every run leaves its page, also one that fails or is interrupted; and a page that cannot be made ends no run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import TRAINER

from qat.config import DataConfig, ExportConfig, ModelConfig, RunConfig, TrainConfig
from qat.conversion.record import Conversion
from qat.train import run
from qat.training import recording as module
from qat.training.checkpoints import Found
from qat.training.recording import Facts, recording
from qat.training.signals import Interrupted


@pytest.fixture
def config(tiny_model: Path, text_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=str(tiny_model)),
        data=DataConfig(train=str(text_file), sequence_length=32, batch_size=4, valid_fraction=0.1),
        trainer=replace(TRAINER, max_steps=4),
        export=ExportConfig(formats=[]),
        run=RunConfig(name="tiny", dir=str(tmp_path / "run")),
    )


def test_a_run_ends_with_its_page_and_the_record_of_its_start(config: TrainConfig, tmp_path: Path) -> None:
    run(config)
    said = (tmp_path / "run" / "report.html").read_text()
    assert "after training" in said and "to the bit" in said
    (start,) = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert start["step"] == 0 and {"time", "command", "commit"} <= start.keys()


@pytest.mark.parametrize(
    ("error", "expected"), [(ValueError("no memory is left"), "failed"), (Interrupted(15), "interrupted at step 0")]
)
def test_a_run_that_does_not_end_has_one_too(config: TrainConfig, tmp_path: Path, error: BaseException, expected: str) -> None:
    (tmp_path / "config.yaml").write_text("run:\n  name: tiny\n")
    try:
        with recording(Facts(config, Conversion("bitlinear", config.quant), str(tmp_path))):
            raise error
    except ValueError:
        pass
    assert expected in (tmp_path / "report.html").read_text()


def test_the_page_of_a_run_that_failed_while_training_is_named(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("run:\n  name: tiny\n")
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,2.0\n")
    with pytest.raises(ValueError), recording(Facts(config, Conversion("bitlinear", config.quant), str(tmp_path))):
        raise ValueError("the loss is not finite")
    page = f"report     {tmp_path / 'report.html'}\n"
    assert capsys.readouterr().out == page
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"half of")
    facts = Facts(config, Conversion("bitlinear", config.quant), str(tmp_path))
    with pytest.raises(ValueError, match="not finite"), recording(facts):
        raise ValueError("the loss is not finite")
    said = capsys.readouterr().out
    assert said.startswith(f"{page}checkpoint ") and "last.ckpt" in said and said.count("\n") == 2
    monkeypatch.setattr(module, "newest", lambda folder: Found(folder / "last.ckpt", 30))
    with pytest.raises(ValueError), recording(facts):
        raise ValueError("the loss is not finite")
    assert capsys.readouterr().out == f"{page}checkpoint of step 30; to go on from there: python -m qat.train resume={tmp_path}\n"


def test_a_page_that_cannot_be_made_is_said_and_ends_nothing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folder: Path) -> Path:
        raise RuntimeError("no such template")

    monkeypatch.setattr(module, "write_report", broken)
    with recording(Facts(config, Conversion("bitlinear", config.quant), str(tmp_path))) as book:
        book.add(status="done")
    assert capsys.readouterr().out == f"{tmp_path}: report.html was not written: RuntimeError: no such template\n"
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "done"


def test_texts_and_latents_of_the_stages_are_kept(config: TrainConfig, tmp_path: Path) -> None:
    run(config)
    folder = tmp_path / "run"
    samples = json.loads((folder / "samples.json").read_text())
    assert set(samples["stages"]) == {"full_precision", "converted", "trained", "packed"} and len(samples["prompts"]) == 2
    stages = samples["stages"]
    assert stages["trained"] == stages["packed"]
    assert all(text.startswith(prompt) for text, prompt in zip(stages["trained"], samples["prompts"], strict=True))
    families = json.loads((folder / "latents.json").read_text())["families"]
    assert set(families) == {"q", "k", "v", "o", "gate", "up", "down"}
    q = families["q"]
    assert q["thresholds"] == [-0.5, 0.5] and q["before"] != q["after"] and len(q["centers"]) == len(q["after"]) == 120
    assert sum(q["before"]) == pytest.approx(1, abs=1e-5) and sum(q["after"]) == pytest.approx(1, abs=1e-5)
    page = (folder / "report.html").read_text()
    assert 'id="latents"' in page and 'class="texts"' in page


def test_what_is_kept_leaves_the_run_as_it_is(config: TrainConfig, tmp_path: Path) -> None:
    kept = run(config)
    config.trainer, config.run = replace(config.trainer, samples=0, monitor_every=None), RunConfig(dir=str(tmp_path / "bare"))
    bare = run(config)
    assert bare.perplexity == kept.perplexity and not (tmp_path / "bare" / "samples.json").exists()
    assert not (tmp_path / "bare" / "latents.json").exists()
