"""The study of methods: its rows are settings that a run takes, its choices and tables are right."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.quality import rows, runs, table
from qat.config.compose.composing import compose_run
from qat.reporting.result import Perplexity, RunResult

STUDY = rows.read()
EVERY = [(run, plan) for plan in STUDY.plan for found in STUDY.runs(plan) for run in found]


def places(tmp_path: Path) -> dict[str, str]:
    """A folder with the texts that rows name, which a configuration's check wants to be there."""
    for keys in STUDY.models.values():
        for key in ("data.train", "data.valid"):
            if "{" in str(keys.get(key, "")):
                file = Path(keys[key].format(shared=tmp_path, out=tmp_path))
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("text")
    return {"shared": str(tmp_path), "out": str(tmp_path)}


@pytest.mark.parametrize("name", sorted({run.row.name for run, _ in EVERY}))
def test_every_row_is_a_run_of_the_budgets_tokens(name: str, tmp_path: Path) -> None:
    """Where a row sweeps, its first and last values stand for those between."""
    of_row = [(run, plan) for run, plan in EVERY if run.row.name == name]
    for run, _ in (of_row[0], of_row[-1]):
        config = compose_run(run.arguments(places(tmp_path)))
        config.check()
        tokens = config.trainer.max_steps * config.data.batch_size * config.data.sequence_length
        assert run.tokens - config.data.batch_size * config.data.sequence_length < tokens <= run.tokens
        assert config.seed == run.seed


def test_names_of_runs_are_their_own() -> None:
    names = [run.name for run, _ in EVERY]
    assert len(set(names)) == len(names)


def write(tmp_path: Path) -> rows.Study:
    values = {
        "models": {"m": {"data.batch_size": 2, "data.sequence_length": 8, "model.path": "{shared}/m"}},
        "budgets": {"screen": {"tokens": 160}, "full": {"tokens": 1600, "after": "screen"}},
        "rows": {
            "plain": {"says": "plain", "keys": {"optim.warmup_steps": "10%"}, "sweep": {"optim.lr": [0.1, 0.2]}},
            "wide": {"says": "wide", "like": "plain", "keys": {"data.batch_size": 4, "quant": "binary"}},
            "fixed": {"says": "fixed", "like": "plain", "keys": {"optim.lr": 0.5, "trainer.compile": True}},
        },
        "plan": [
            {"model": "m", "budget": "screen", "rows": ["plain", "wide", "fixed"]},
            {"model": "m", "budget": "full", "rows": ["plain", "fixed"], "seeds": [0, 1]},
            {"model": "m", "budget": "full", "rows": ["plain"], "seeds": [2]},
        ],
    }
    file = tmp_path / "rows.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return rows.read(file)


def finished(folder: Path, perplexity: float, status: str = "done") -> None:
    folder.mkdir(parents=True)
    stages = {"full_precision": 4.0, "converted": 100.0, "trained": perplexity, "packed": perplexity}
    RunResult(status=status, perplexity=Perplexity("text", 8, 8, 8, stages), bytes={"packed_linears": 64}).save(folder)


def test_a_row_is_the_sum_of_its_diffs_and_updates_follow_from_tokens(tmp_path: Path) -> None:
    screen = [run for found in write(tmp_path).runs(write(tmp_path).plan[0]) for run in found]
    assert [run.name for run in screen] == [
        "m/screen/plain/seed0-lr0.1", "m/screen/plain/seed0-lr0.2",
        "m/screen/wide/seed0-lr0.1", "m/screen/wide/seed0-lr0.2", "m/screen/fixed/seed0",
    ]  # fmt: skip
    wide = screen[2].arguments({"shared": "/x"})
    assert wide[:2] == ["recipe=plain", "quant=binary"]
    assert {"model.path=/x/m", "trainer.max_steps=5", "optim.warmup_steps=0"} <= set(wide)
    assert {"trainer.max_steps=10", "optim.warmup_steps=1", "trainer.compile=true"} <= set(screen[4].arguments({}))


def test_later_budgets_take_the_best_of_the_sweep(tmp_path: Path) -> None:
    study, out = write(tmp_path), tmp_path / "out"
    plain, fixed = list(study.runs(study.plan[1]))
    assert runs.chosen(study, out, plain) == []  # nothing was screened
    finished(out / "m/screen/plain/seed0-lr0.1", 9.0)
    finished(out / "m/screen/plain/seed0-lr0.2", 7.0)
    assert [run.name for run in runs.chosen(study, out, plain)] == ["m/full/plain/seed0-lr0.2", "m/full/plain/seed1-lr0.2"]
    assert [run.name for run in runs.chosen(study, out, *study.runs(study.plan[2]))] == ["m/full/plain/seed2-lr0.2"]
    assert [run.name for run in runs.chosen(study, out, fixed)] == ["m/full/fixed/seed0", "m/full/fixed/seed1"]


def test_tables_put_seeds_together_and_leave_out_what_was_interrupted(tmp_path: Path) -> None:
    study, out = write(tmp_path), tmp_path / "out"
    finished(out / "m/full/plain/seed0-lr0.2", 8.0)
    finished(out / "m/full/plain/seed1-lr0.2", 6.0)
    finished(out / "m/full/plain/seed2-lr0.2", 3.0)  # of another plan
    finished(out / "m/full/fixed/seed0", 5.0)
    finished(out / "m/full/fixed/seed1", 1.0, status="interrupted at step 3/4")
    best, second = table.lines(study, out, "m", "full")
    assert (best.row.name, best.median) == ("fixed", 5.0) and math.isclose(second.gap, math.log(6 / 4))
    text = "\n".join(table.tables(study, out))
    assert "| plain | ours | plain | lr 0.2 | 3 | 6.000 (8.000, 6.000, 3.000) | 0.405 | 64 bytes |" in text
    assert table.points(study, out) == [("fixed", "ours", 64, 5.0), ("plain", "ours", 64, 6.0)]
    (out / table.UNTRAINED).write_text('[{"row": "4 bits", "of": "post-training", "bytes": 32, "perplexity": 9.0}]')
    assert table.points(study, out)[2:] == [("4 bits", "post-training", 32, 9.0)]


def test_the_picture_marks_what_nothing_beats(tmp_path: Path) -> None:
    picture = pytest.importorskip("benchmarks.quality.picture", reason="matplotlib is not installed", exc_type=ImportError)
    points = [("a", "ours", 10, 5.0), ("b", "peer", 10, 6.0), ("c", "ours", 20, 4.0), ("d", "peer", 30, 4.5)]
    assert [point[0] for point in picture.front(points)] == ["a", "c"]
    picture.save(points, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().count("<svg") == 1


def test_without_the_texts_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.quality", "run", "--shared", str(tmp_path / "none"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 1 and done.stderr.strip() == f"skipped: {tmp_path / 'none'} is not there"
