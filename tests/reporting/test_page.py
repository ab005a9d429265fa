"""The page of a run: what it says of runs that ended well, badly or not at all, and that nothing in a folder breaks it."""

from __future__ import annotations

import base64
import copy
import dataclasses
import functools
import gzip
import json
import math
import operator
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from run_folders import RESULT, ROWS, with_trained, write_run

from qat import report as verb
from qat.monitor.alarms import Alarm, AlarmsFile
from qat.reporting.following import following
from qat.reporting.page.charts import MOST_POINTS, loss_figure, thinned
from qat.reporting.page.compare import comparison
from qat.reporting.page.heat import MOST_ROWS, heat_figure
from qat.reporting.page.phases import phases, resumes
from qat.reporting.page.reading import Series, read_metrics, read_run
from qat.reporting.page.render import breakable, report, write_report
from qat.reporting.page.reproduce import command, differences, next_commands
from qat.reporting.page.verdict import verdict

MOST_BYTES = 2_500_000


def shown_figures(html: str) -> list[dict[str, Any]]:
    """The figures inside a page."""
    packed = re.search(r'id="figures">([^<]*)<', html)
    assert packed is not None
    found = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    return found  # type: ignore[no-any-return]


def words(html: str) -> str:
    """What a page says, without its scripts."""
    return re.sub(r"\s+", " ", re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", " ", html, flags=re.S))


def drawable(figures: list[dict[str, Any]]) -> None:
    """plotly knows every trace and property; colours are names until the page gives them their values."""
    plain = json.loads(re.sub(r'"--[a-z0-9-]+"', '"#123456"', json.dumps(figures)))
    for figure in plain:
        go.Figure(figure["data"], figure["layout"])


def test_the_verdict_says_perplexity_distance_and_size(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    said = verdict(run)
    assert said.sentence == (
        "Perplexity 5.000 on valid.txt after training, 25.0% above full precision's 4.000; 95.2% of what the conversion cost is"
        " recovered. The packed model is 5.0 times smaller than in bf16 (100.00 kB)."
    )
    assert said.tone == "warn"


@pytest.mark.parametrize(
    ("result", "tone", "expected"),
    [
        ({"status": "failed: the loss is nan at step 30"}, "bad", "The run failed after step 100: the loss is nan at step 30."),
        (
            {"status": "interrupted at step 40; continue with resume=x"},
            "warn",
            "The run was interrupted at step 40 and can go on",
        ),
        ({"status": "running"}, "quiet", "The run is at step 100 of 100; nothing is decided yet."),
        (with_trained(math.inf), "bad", "Training diverged"),
        (with_trained(3.5), "good", "12.5% below full precision's 4.000"),
        (with_trained(400.0), "bad", "after training, 100 times full precision's 4.000; 0.0% of"),
        (
            {**RESULT, "status": "stopped at step 70 by early stopping"},
            "warn",
            "The run was stopped at step 70 by early stopping.",
        ),
        (None, "quiet", "The run is at step 100 of 100"),
    ],
)
def test_verdicts_of_other_ends(tmp_path: Path, result: dict[str, Any] | None, tone: str, expected: str) -> None:
    said = verdict(read_run(write_run(tmp_path, result)))
    assert expected in said.sentence and said.tone == tone
    assert expected in words(report(read_run(tmp_path))).replace("&#39;", "'")


def test_the_verdict_of_a_failed_run_names_its_divergence(tmp_path: Path) -> None:
    write_run(tmp_path, {**RESULT, "status": "failed: perplexity is not finite"})
    assert verdict(read_run(tmp_path)).sentence == "The run failed after step 100: perplexity is not finite."
    AlarmsFile(tmp_path).raised(Alarm(50, "divergence", "cross-entropy is 9.00", "optim.lr=1e-3"))
    expected = "Training diverged: the run failed after step 100: perplexity is not finite."
    assert verdict(read_run(tmp_path)).sentence == expected


def test_a_killed_run_is_told_from_one_that_trains_on(tmp_path: Path) -> None:
    """Its process held the lock; a run of an earlier version, or elsewhere, may have none."""
    fcntl = pytest.importorskip("fcntl")
    write_run(tmp_path, {**RESULT, "status": "running"})
    assert not read_run(tmp_path).killed and "--watch" in next_commands(read_run(tmp_path))[0][1]
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert verdict(read_run(tmp_path)).sentence == "The run is at step 100 of 100; nothing is decided yet."
    run = read_run(tmp_path)
    assert verdict(run).sentence == "The run was killed after step 100 of 100; it has left no checkpoint to go on from."
    (tmp_path / "checkpoints" / "step=50.ckpt").mkdir(parents=True)
    assert verdict(run).sentence.endswith("it can go on from its last checkpoint.") and verdict(run).tone == "warn"
    assert [words for words, _ in next_commands(run)] == ["go on"]


def test_the_curves_of_a_run_that_has_not_ended_fill_their_chart(tmp_path: Path) -> None:
    """Behind them is what has been, not what would have come."""
    run = read_run(write_run(tmp_path, {**RESULT, "status": "running"}, ROWS[:3]))
    run.config["optim"] |= {"anneal": "soft", "anneal_share": 0.8}
    assert phases(run) == [("warm-up", 0, 10), ("soft codes", 0, 30)]
    run = read_run(write_run(tmp_path))
    run.config["optim"] |= {"anneal": "soft", "anneal_share": 0.8}
    assert phases(run) == [("warm-up", 0, 10), ("soft codes", 0, 80)]


def test_a_diverged_run_begins_anew(tmp_path: Path) -> None:
    write_run(tmp_path, {**RESULT, "status": "failed: perplexity is not finite"})
    (tmp_path / "starts.jsonl").write_text(
        json.dumps({"command": "python -m qat.train recipe=plain optim.lr=2 run.dir=x"}) + "\n"
    )
    AlarmsFile(tmp_path).raised(Alarm(50, "divergence", "cross-entropy is 9.00", "optim.lr=0.003"))
    command = "python -m qat.train recipe=plain optim.lr=0.003"
    assert next_commands(read_run(tmp_path)) == [("begin anew, slower", command)]


def test_keys_and_paths_break_where_they_may() -> None:
    assert breakable("trainer.val_every a/b 0.5 <i>") == "trainer.<wbr>val_<wbr>every a/<wbr>b 0.5 &lt;i&gt;"


def test_the_page_is_one_small_file_that_names_no_address(tmp_path: Path) -> None:
    file = write_report(write_run(tmp_path))
    html = file.read_text()
    assert file == tmp_path / "report.html" and file.stat().st_size < MOST_BYTES
    own = re.sub(r'<script type="text/plain".*?</script>', "", html, flags=re.S)
    assert re.findall(r"(?:https?:)?//[a-z][^\s\"']*", own) == [] and 'href="' in own
    assert set(re.findall(r'(?:src|href)="([^"]*)"', own)) <= {"data:,", *re.findall(r'href="(#[a-z]+)"', own)}
    assert "default-src 'none'" in own and "connect-src" not in own and "unsafe-eval" not in own
    drawable(shown_figures(html))


def test_sections_come_in_their_order_and_link_to_each_other(tmp_path: Path) -> None:
    (write_run(tmp_path) / "packed").mkdir()
    html = report(read_run(tmp_path))
    order = re.findall(r'<section id="([a-z]+)"', html)
    expected = ["result", "curves", "samples", "speed", "data", "layers", "verification", "reproduce", "next"]
    assert [key for key in order if key in expected] == expected
    assert re.findall(r'<a href="#([a-z]+)"', html) == order


def test_what_a_folder_says_is_text_not_markup(tmp_path: Path) -> None:
    result = {**RESULT, "status": "failed: <script>alert(1)</script>"}
    html = report(read_run(write_run(tmp_path, result, name="'</script><b>x'")))
    assert "<script>alert" not in html and "</script><b>" not in html and "&lt;script&gt;alert(1)" in html


NAMES = ("result.json", "metrics.csv", "config.yaml", "samples.json", "latents.json", "damage.json", "starts.jsonl")
NAMES += ("overrides.jsonl", "layers.arrow", "alarms.jsonl")
OTHER = b'{"families": 3, "stages": 4, "layers": [1], "step": "x", "bytes": 3, "conversion": [], "trainer": 3, "task": "x"}'


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [b"", b"\0\xff{", b"[1, 2]", b'{"a": ', b"step,train/loss\n1", OTHER])
def test_a_damaged_file_breaks_nothing(tmp_path: Path, name: str, content: bytes) -> None:
    write_run(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert "<section" in report(read_run(tmp_path))


@pytest.mark.parametrize("place", [("perplexity", "trained"), ("bytes", "packed_model"), ("seconds",), ("tokens",)])
@pytest.mark.parametrize("value", [-1, 0, "x", [1], {}, True, math.nan, math.inf])
def test_a_result_of_other_values_breaks_neither_page_nor_comparison(tmp_path: Path, place: tuple[str, ...], value: Any) -> None:
    found: Any = copy.deepcopy(RESULT)
    *path, last = place
    functools.reduce(operator.getitem, path, found)[last] = value
    run = read_run(write_run(tmp_path / "odd", found))
    whole = read_run(write_run(tmp_path / "whole", with_trained(4.5)))
    assert '<section id="result"' in report(run, bundle=False)
    assert "whole comes closest" in words(comparison([run, whole]))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "damage.json").write_text("[")
    (tmp_path / "result.json").write_text("{")
    said = words(report(read_run(tmp_path)))
    assert "Not readable: damage.json" in said and "Not readable: result.json" in said


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    rows = [*ROWS, {"step": 110, "train/loss": "nan", "train/ce": "inf"}, {"step": 120, "train/loss": 1.0}]
    html = report(read_run(write_run(tmp_path, with_trained(math.nan), rows)))
    loss = next(
        one for figure in shown_figures(html) if figure["title"] == "Loss" for one in figure["data"] if one["name"] == "loss"
    )
    assert loss["y"][-2:] == [None, 1.0] and "not finite" in words(html)


def test_losses_are_one_chart_and_what_else_is_held_out_its_own(tmp_path: Path) -> None:
    more = {"val/agreement": 0.5, "val/gap": 0.1, "val/teacher_ce": 1.5, "train/epoch": 0.1, "train/weight/kl": 1.0}
    figures = shown_figures(report(read_run(write_run(tmp_path, rows=[{**row, **more} for row in ROWS]))))
    lines = {figure["title"]: [one["name"] for one in figure["data"]] for figure in figures}
    assert lines["Loss"] == ["loss", "ce", "ce, held out"] and lines["gap"] == ["gap"] and lines["agreement"] == ["agreement"]
    assert lines["Perplexity"][0] == "held-out text" and "teacher ce" not in lines


def test_a_statistic_is_one_chart_of_the_model_and_its_families(tmp_path: Path) -> None:
    more = {"quant/q/error": 0.2, "quant/error": 0.3, "quant/mlp.down/error": 0.4, "quant/zero_fraction": 0.5}
    figures = shown_figures(report(read_run(write_run(tmp_path, rows=[{**row, **more} for row in ROWS]))))
    lines = {figure["title"]: [one["name"] for one in figure["data"]] for figure in figures}
    assert lines["error"] == ["all", "q", "mlp.down"] and lines["zero fraction"] == ["all"]
    drawable(figures)


def test_samples_stand_side_by_side_without_their_prompt(tmp_path: Path) -> None:
    stages = {"trained": ["Once a cat sat." + 40 * "\n", "no"], "full_precision": ["Once a dog\n\n\n\nran.", "yes"]}
    (write_run(tmp_path) / "samples.json").write_text(json.dumps({"prompts": ["Once", ""], "stages": stages}))
    html = report(read_run(tmp_path))
    answers = re.findall(r"<h4>([^<]*)</h4><p>([^<]*)</p>", html)
    assert answers[:2] == [("full precision", "a dog\n\nran."), ("after QAT", "a cat sat.")]
    assert answers[2:] == [("full precision", "yes"), ("after QAT", "no")]


def test_rows_that_are_torn_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,step,train/loss\n0,1,3.5\n0,2\nx,y,z\n0,3,2.5\n0,4,1")
    assert read_metrics(file)["train/loss"] == Series([1, 3, 4], [3.5, 2.5, 1.0])


def test_long_lines_are_thinned_and_keep_their_ends() -> None:
    found = thinned(Series(list(range(100_000)), [float(i) for i in range(100_000)]))
    assert len(found.steps) == MOST_POINTS and found.steps[0] == 0 and found.steps[-1] == 99_999
    assert found.values == [float(step) for step in found.steps]


def test_phases_and_resumes_are_marked(tmp_path: Path) -> None:
    write_run(tmp_path)
    starts = [{"step": 0, "command": "python -m qat.train recipe=quickstart"}, {"step": 40}, {"step": 60}]
    (tmp_path / "starts.jsonl").write_text("\n".join(map(json.dumps, starts)) + '\n{"step": 8')
    (tmp_path / "overrides.jsonl").write_text(json.dumps({"step": 60, "changes": {"optim.lr": [1, 2]}}))
    run = read_run(tmp_path)
    assert phases(run) == [("warm-up", 0, 10)] and resumes(run) == [(40, ""), (60, "optim.lr")]
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("warmup_steps: 10", "warmup_steps: 0\n  warmup_share: 0.05"))
    assert phases(read_run(tmp_path)) == [("warm-up", 0, round(0.05 * run.get("trainer.max_steps")))]
    figure = loss_figure(run)
    assert figure is not None
    assert [one["text"] for one in figure.layout["annotations"]] == ["warm-up", "resumed", "resumed: optim.lr"]


def test_thousands_of_layers_and_looks_fit(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.{part}" for i in range(400) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    values = [[float(i + look) for i in range(len(names))] for look in range(300)]
    values[7][1] = values[299][0] = math.nan
    figure = heat_figure("Error", values, names, list(range(300)), "")
    (trace,) = figure.data
    assert len(trace["y"]) <= 180 == len(set(trace["y"])) + 180 - len(trace["y"]) and len(trace["x"]) == 100
    assert trace["y"][0] == "q 0–6" and trace["z"][0][0] == 18.0  # the worst of the band: layer 6's q_proj
    assert "1,200 layers" in figure.caption and figure.height <= 760
    drawable([{"data": figure.data, "layout": figure.layout}])


def test_names_without_numbers_and_one_look_are_drawn() -> None:
    figure = heat_figure("Zero", [[0.1, math.inf]], ["head", "other.head"], [5], "")
    assert figure.data[0]["y"] == ["head", "other.head"] and math.isnan(figure.data[0]["z"][1][0])
    assert heat_figure("Zero", [[math.nan]], ["head"], [5], "").data[0]["zmax"] == 1.0


def test_a_map_that_is_cut_says_so_and_families_are_those_of_the_curves() -> None:
    names = [f"block{i}x.proj_{i}" for i in range(1000)]  # no number of its own: each is its family
    figure = heat_figure("Zero", [[0.5] * 1000], names, [5], "")
    assert len(figure.data[0]["y"]) == MOST_ROWS and f"The first {MOST_ROWS} of 1,000 rows" in figure.caption
    names = [f"layers.{i}.{part}.dense" for i in range(2) for part in ("attention", "mlp")]
    labels = heat_figure("Zero", [[0.5] * 4], names, [5], "").data[0]["y"]
    assert labels == ["attention.dense 0", "attention.dense 1", "mlp.dense 0", "mlp.dense 1"]


def test_what_charts_leave_out_is_said(tmp_path: Path) -> None:
    rows = [{"step": 1, **{f"quant/f{i}/error": 0.1 for i in range(12)}, **{f"optim/lr/g{i}": 0.1 for i in range(15)}}]
    write_run(tmp_path, rows=rows)
    said = words(report(read_run(tmp_path), bundle=False))
    assert "4 more families are not shown." in said and "3 more are not shown." in said


def test_the_command_and_what_differs_from_the_recipe(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, name="stories260k", lr=0.125))
    recipe, found = differences(run)
    assert recipe == "stories260k" and found["optim.lr"][1] == 0.125 and "trainer.max_steps" in found and "run.name" not in found
    assert command(run).startswith("python -m qat.train recipe=stories260k ") and "optim.lr=0.125" in command(run)
    (tmp_path / "starts.jsonl").write_text('{"step": 0, "command": "python -m qat.train recipe=custom a=b"}\n')
    run = read_run(tmp_path)
    assert command(run) == "python -m qat.train recipe=custom a=b" and differences(run)[0] == "custom"


def test_an_unfinished_run_is_to_be_resumed(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a run", {"status": "interrupted at step 4; x"}))
    resume = f"python -m qat.train 'resume={tmp_path}/a run'"
    assert next_commands(run) == [("go on", resume)]
    run = read_run(write_run(tmp_path / "a run", {"status": "running"}))
    watch = f"python -m qat.report --watch '{tmp_path}/a run'"
    assert next_commands(run) == [("look on while it trains", watch), ("go on, if it was killed", resume)]


def test_page_and_terminal_say_the_same_next_commands(tmp_path: Path) -> None:
    (write_run(tmp_path / "run") / "packed").mkdir()
    run = read_run(tmp_path / "run")
    said = [line for _, line in next_commands(run)]
    assert said[:3] == following(dataclasses.replace(run.result, folder=str(run.folder)))
    assert said[3:] == [f"python -m qat.train resume={run.folder} trainer.max_steps=N"]
    scores = {"text": "a", "examples": 2, "majority": 0.5, "measure": "accuracy", "converted": 0.4, "trained": 0.5}
    (write_run(tmp_path / "labels", {**RESULT, "perplexity": {}, "accuracy": scores}) / "packed").mkdir()
    assert next_commands(read_run(tmp_path / "labels"))[0][1] == f"python -m qat.inspect {tmp_path}/labels"


def test_the_verb_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    assert verb.main([str(tmp_path / "run")]) == 0 and (tmp_path / "run" / "report.html").is_file()
    assert verb.main([str(tmp_path / "run"), "--out", str(tmp_path / "x.html")]) == 0 and (tmp_path / "x.html").is_file()
    assert capsys.readouterr().out == f"{tmp_path}/run/report.html\n{tmp_path}/x.html\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "there is no such folder"),
        (["file"], "it is a file"),
        (["."], "there is no config.yaml in it"),
        (["run", "nowhere"], "there is no such folder"),
        (["--watch", "run", "run"], "--watch takes one run; given: 2"),
        (["--watch", "run", "--port", "70000"], "--port 70000 is not allowed"),
        (["--watch", "nowhere"], "there is no such folder"),
        (["--watch", "run", "--out", "x.html"], "--out is for a page that is written"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    write_run(tmp_path / "run") if "run" in arguments else None
    assert verb.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("qat.report: ") and expected in said


def test_the_verb_says_that_a_run_has_no_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "with"), write_run(tmp_path / "bare", None, None)]
    (runs[1] / "metrics.csv").write_text("step,train/loss\n")
    said = f"qat.report: no step was logged of {runs[1]}: no curves are drawn\n"
    for given in (runs[1:], [*runs, "--out", tmp_path / "two.html"]):
        assert verb.main([*map(str, given)]) == 0 and capsys.readouterr().err == said
    assert verb.main([str(runs[0])]) == 0 and capsys.readouterr().err == ""


def test_a_run_without_metrics_says_so(tmp_path: Path) -> None:
    html = report(read_run(write_run(tmp_path, {"status": "failed: no memory"}, None)))
    said = words(html)
    assert "The run failed before its first step was logged: no memory." in said
    assert "No step was logged" in said and "Nothing was measured yet." in said and 'id="plotly"' not in html
