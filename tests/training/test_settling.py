"""What a run settles: rates by the model's size, budgets in tokens and passes, and a validation that a short run would lose."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from qat.config import DataConfig, ExportConfig, ModelConfig, OptimConfig, QuantConfig, RunConfig, TrainConfig, TrainerConfig
from qat.config.compose.composing import compose_run, one_budget
from qat.config.compose.saved import load_config
from qat.quantizers import QUANTIZERS
from qat.reporting.rates import fine_tuning_rate, rated
from qat.reporting.settling import settled, with_data
from qat.train import run
from qat.training.callbacks.metrics_file import read_rows
from qat.training.schedule import lr_factor


@pytest.fixture
def config(tiny_model: Path, text_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=str(tiny_model)),
        data=DataConfig(train=str(text_file), sequence_length=32, batch_size=4, valid_fraction=0.1),
        trainer=TrainerConfig(max_steps=4, accelerator="cpu", progress=False, log_every_n_steps=1, threads=1, samples=0),
        export=ExportConfig(formats=[]),
        run=RunConfig(name="tiny", dir=str(tmp_path / "run")),
    )


def test_the_rate_falls_with_the_size() -> None:
    sizes = [260_000, 10_000_000, 135_000_000, 1_000_000_000, 8_000_000_000]
    assert [fine_tuning_rate(size) for size in sizes] == [5e-4, 5e-4, 8.1e-5, 2e-5, 2e-5]


def test_a_rate_is_a_multiple_or_what_is_said() -> None:
    by_size = TrainConfig(optim=OptimConfig(lr=None, lr_multiple=6.0))
    assert rated(by_size, 260_000).optim.lr == pytest.approx(3e-3)  # what was best for stories260k
    assert rated(TrainConfig(optim=OptimConfig(lr=7e-3)), 260_000).optim.lr == 7e-3
    with pytest.raises(ValueError, match="optim.lr=null is settled"):
        _ = by_size.optim.peak


def test_warm_up_as_a_share() -> None:
    optim = OptimConfig(warmup_share=0.05)
    assert optim.warmup(3000) == 150 and replace(optim, warmup_steps=7).warmup(3000) == 7
    assert lr_factor(149, 3000, "cosine", optim.warmup(3000)) == 1.0
    with pytest.raises(ValueError, match=r"optim.warmup_share=1.0"):
        OptimConfig(warmup_share=1.0)


def test_soft_codes_where_the_quantizer_has_them() -> None:
    auto = TrainConfig(optim=OptimConfig(anneal="auto"))
    without = next(name for name, row in QUANTIZERS.items() if row.soft is None and not row.sharpened)
    hard = replace(auto, quant=QuantConfig(weight=without))
    assert (settled(auto).optim.anneal, settled(hard).optim.anneal) == ("soft", "none")


def test_a_budget_in_tokens(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config.trainer = replace(config.trainer, max_tokens=3 * 128 + 127)
    result = run(config)
    assert result.tokens == 3 * 128
    saved = load_config(result.folder)
    assert (saved.trainer.max_steps, saved.trainer.max_tokens) == (3, 511)
    more = load_config(result.folder, ["trainer.max_steps=5"])
    assert more.trainer.max_tokens is None and run(more).tokens == 5 * 128
    with pytest.raises(ValueError, match="trainer.max_tokens=100 is less than one update of 128 tokens"):
        settled(replace(config, trainer=replace(config.trainer, max_tokens=100)))


def test_a_budget_in_passes_and_how_many_there_are(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config.trainer = replace(config.trainer, max_epochs=0.05)
    result = run(config)
    lines = capsys.readouterr().out.splitlines()
    said = next(line for line in lines if " passes over text.txt, " in line)
    sequences = int(said.split(", ")[1].split()[0].replace(",", ""))
    steps = round(0.05 * sequences / 4)
    assert result.tokens == steps * 128 and steps > 1
    assert float(said.split()[0]) == pytest.approx(4 * steps / sequences, rel=0.01)
    assert run(load_config(result.folder, ["trainer.max_epochs=0.08"])).tokens == round(0.08 * sequences / 4) * 128


def test_one_budget_is_said_and_it_takes_back_another() -> None:
    settings = ["model.path=m", "data.train=t", "run.dir=x", "recipe=stories260k"]
    assert compose_run([*settings, "trainer.max_epochs=2"]).trainer.max_epochs == 2
    assert one_budget(["trainer.max_steps=5"]) == ["trainer.max_tokens=null", "trainer.max_epochs=null"]
    for two in (["trainer.max_steps=5", "trainer.max_tokens=9"], ["trainer.max_epochs=5", "trainer.max_tokens=9"]):
        with pytest.raises(ValueError, match="are budgets of one run; give one of trainer.max_steps, trainer.max_tokens"):
            compose_run([*settings, *two])
    with pytest.raises(ValueError, match="a budget is in steps, tokens or epochs"):
        TrainerConfig(max_tokens=1, max_epochs=1.0)
    mixed = TrainConfig(data=DataConfig(kind="mixed"), trainer=TrainerConfig(max_epochs=1.0))
    with pytest.raises(ValueError, match="trainer.max_epochs does not fit data=mixed"):
        with_data(mixed, None)


def test_a_short_run_is_validated_at_its_end(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config.trainer = replace(config.trainer, val_every=100, val_batches=1)
    folder = Path(run(config).folder)
    assert "trainer.val_every=100 is above trainer.max_steps: one validation, at the end" in capsys.readouterr().out
    rows = read_rows(folder / "metrics.csv")[0]
    assert [int(row["step"]) for row in rows if "val/ce" in row] == [4]
    assert load_config(str(folder)).trainer.val_every == 100


def test_the_bare_command_trains_with_a_teacher_soft_codes_and_a_stated_rate(
    tiny_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"model.path={tiny_model}", f"data.train={text_file}", f"run.dir={tmp_path / 'run'}"]
    config = compose_run(given)
    assert (config.distill.ce, config.distill.kl, config.distill.hidden) == (0.5, 0.5, 2.0)
    assert config.trainer.max_steps == 3000 and config.optim.warmup(3000) == 150 and config.trainer.val_every == 250
    before = copy.deepcopy(config)
    small = ["data.sequence_length=32", "trainer.max_steps=2", "trainer.threads=1", "trainer.progress=false", "export.formats=[]"]
    result = run(compose_run([*given, *small]))
    out = capsys.readouterr().out
    assert "optim.lr=0.003, 6 times 0.0005, at which" in out
    assert result.status == "done" and config == before
    saved = load_config(result.folder)
    assert saved.optim.lr == pytest.approx(3e-3) and saved.optim.anneal == "soft"


def test_a_dry_run_says_what_the_teacher_costs(
    tiny_model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"model.path={tiny_model}", f"data.train={text_file}", f"run.dir={tmp_path / 'run'}", "dry_run=true"]
    run(compose_run([*given, "data.sequence_length=32"]))
    out = capsys.readouterr().out
    assert "teacher         a second model in full precision" in out and "distill=none trains without" in out
    assert "text            " in out and " passes over text.txt" in out
