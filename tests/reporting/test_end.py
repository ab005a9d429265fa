"""The end of a run: deltas beside the values, the report where there is one, and commands that a shell takes as they are."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from qat.reporting.following import following
from qat.reporting.result import Perplexity, RunResult
from qat.reporting.scores import Scores
from qat.reporting.table import print_table

STAGES = {"full_precision": 10.0, "converted": 1000.0, "trained": 12.0, "packed": 12.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run, with a name that a shell would tear apart."""
    found = tmp_path / "my run; it's (2)"
    (found / "packed").mkdir(parents=True)
    (tmp_path / "a text.txt").write_text("x")
    (found / "config.yaml").write_text(f"data:\n  kind: text\n  train: x\n  valid: {tmp_path / 'a text.txt'}\n")
    return found


def result(folder: Path, **more: object) -> RunResult:
    return RunResult("done", "r", str(folder), perplexity=Perplexity("valid.txt", 100, 8, 8, STAGES), **more)  # type: ignore[arg-type]


def test_deltas_stand_beside_the_values(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table(result(folder))
    shown = capsys.readouterr().out.splitlines()
    row = next(line for line in shown if "after QAT" in line)
    assert "12.000" in row and "+0.182" in row and max(len(line) for line in shown if line.startswith(("│", "┃"))) <= 80
    assert "+4.605" in next(line for line in shown if "converted" in line)
    assert not any(line.startswith("report") for line in shown)
    assert shown[-1] == f"run        {folder} (done)"


def test_a_report_is_named_where_there_is_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "report.html").write_text("x")
    print_table(result(folder))
    assert f"report     {folder / 'report.html'}" in capsys.readouterr().out.splitlines()


def test_commands_paste(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [shlex.split(line) for line in following(result(folder))]
    assert commands == [
        ["python", "-m", "qat.generate", str(folder), "--prompt", "Once upon a time"],
        ["python", "-m", "qat.evaluate", str(folder), "--text", str(tmp_path / "a text.txt")],
        ["python", "-m", "qat.export", str(folder), "--out", str(folder / "model.gguf")],
    ]
    print_table(result(folder))
    assert [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")] == commands


def test_llama_cpp_where_its_file_is(folder: Path) -> None:
    (folder / "model.gguf").write_text("x")
    assert shlex.split(following(result(folder))[-1]) == ["llama-cli", "-m", str(folder / "model.gguf"), "-p", "Once upon a time"]


def test_no_export_that_was_refused(folder: Path) -> None:
    refused = result(folder, export={"skipped": {"gguf": "no room"}})
    assert shlex.split(following(refused)[-1])[-1] == str(folder / "model.pt2")


def test_an_interrupted_run_goes_on(folder: Path) -> None:
    assert [shlex.split(line) for line in following(result(folder, signal=2))] == [
        ["python", "-m", "qat.train", f"resume={folder}"]
    ]


def test_a_run_without_a_model_has_no_next_command(tmp_path: Path) -> None:
    assert following(result(tmp_path)) == [] and following(RunResult(status="dry run")) == []


def test_a_classifier_is_looked_at(folder: Path) -> None:
    scores = Scores("dev", 10, 0.5, "accuracy", {"full_precision": 0.9, "trained": 0.85})
    assert following(RunResult("done", "r", str(folder), accuracy=scores))[0].startswith("python -m qat.inspect")
    assert (scores.gap(0.85), scores.gap(0.9)) == ("-5.00", "")
