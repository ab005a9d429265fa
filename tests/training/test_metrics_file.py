"""metrics.csv when a run goes on: what does not parse is dropped, and what earlier versions counted from 0 is counted anew."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from qat.training.callbacks.metrics_file import continued, read_rows


def test_a_damaged_header_s_column_is_dropped_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text('epoch,step,tr"in/loss\n0,10,1.5\n')
    continued(file, ["train/loss"], 30).log_metrics({"train/loss": 1.0}, 20)
    assert "metrics.csv: 1 rows do not parse and are dropped" in capsys.readouterr().out
    assert file.read_text().splitlines() == ["step,tokens,epoch,train/loss", "10,,0,", "20,,,1.0"]


def test_rows_that_do_not_parse_are_dropped_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,step,train/loss\n0,10,1.5\n0,20,x\n0,\0\n0,30,1.25\n0,40,1.\n0,5")
    rows = continued(file, ["val/loss", "train/loss"], 30)
    assert "metrics.csv: 3 rows do not parse and are dropped" in capsys.readouterr().out
    rows.log_metrics({"train/loss": 1.0}, 40)
    rows.log_metrics({"train/loss": 1.0, "lr": 0.5}, 40)
    with file.open() as lines:
        found = list(csv.DictReader(lines))
    assert [(row["step"], row["train/loss"]) for row in found] == [("10", "1.5"), ("30", "1.25"), ("40", "1.0"), ("40", "")]
    assert found[-1]["lr"] == "0.5" and list(found[0]) == ["step", "tokens", "epoch", "train/loss", "val/loss", "lr"]


@pytest.mark.parametrize(("steps", "expected"), [("9 19 19", [10, 20, 20]), ("10 20", [10, 20]), ("0", [1]), ("1 2", [1, 2])])
def test_rows_counted_from_0_by_earlier_versions(tmp_path: Path, steps: str, expected: list[int]) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,step,train/loss\n" + "".join(f"0,{step},1.5\n" for step in steps.split()))
    for _ in range(2):  # a second resume does not count again
        continued(file, ["train/loss"], 100)
        assert [int(row["step"]) for row in read_rows(file)[0]] == expected
