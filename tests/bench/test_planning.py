"""The planner as a user types it: the plan of a tiny model, by tokens and by timed steps, and refusals in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat import plan
from qat.bench.planning import planned
from qat.config.compose.composing import compose_run


def settings(tiny_model: Path, text_file: Path) -> list[str]:
    return [f"model.path={tiny_model}", f"data.train={text_file}", "data.sequence_length=64", "distill=ce_kl"]


def test_its_command_line_composes(tiny_model: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*settings(tiny_model, text_file), "--tokens", "640k"]) == 0
    *_, command = capsys.readouterr().out.strip().splitlines()
    assert command.startswith("python -m qat.train model.path=")
    config = compose_run(command.split()[3:])
    assert (config.data.batch_size, config.trainer.max_steps) == (3, 3333)
    assert config.optim.warmup_steps == 167 and config.optim.beta2_half_life == 3333 * 3 * 64 // 4


def test_hours_are_those_of_timed_steps(tiny_model: Path, text_file: Path) -> None:
    found = planned(compose_run(settings(tiny_model, text_file)), hours=0.01)
    assert found.by_time and found.hours == pytest.approx(0.01, rel=0.35) and found.tokens > 1000


def test_a_model_alone_is_enough(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([str(tiny_model), "data.sequence_length=64", "--tokens", "64000"]) == 0
    output = capsys.readouterr().out
    assert "the model's own" in output and "data.train=FILE" in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokens", "10"], "less than one sequence"),
        (["--hours", "0"], "--hours 0 is not allowed"),
        (["--tokens", "64000", "optim.lrr=1"], "optim.lrr"),
        (["--tokens", "64000", "another"], "are no settings"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words: list[str], said: str, tiny_model: Path, capsys) -> None:
    assert plan.main([str(tiny_model), "data.sequence_length=64", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("qat.plan: ")]) == 1 and said in error[-1]


@pytest.mark.parametrize("text", ["1,600,000", "1.6M", "1600k", "1.6e6", "0.0016b"])
def test_numbers_of_tokens(text: str) -> None:
    assert plan._count(text) == 1_600_000


@pytest.mark.parametrize("words", [[], ["--tokens", "x"], ["--tokens", "0"], ["--tokens", "1", "--hours", "1"]])
def test_a_budget_is_needed(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan.main(["model", *words])
    assert ended.value.code == 2
