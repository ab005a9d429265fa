"""Several runs beside each other, and the page of one that trains, served."""

from __future__ import annotations

import json
import math
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from run_folders import RESULT, ROWS, with_trained, write_run
from test_page import drawable, shown_figures, words

from qat import report as verb
from qat.reporting.page.compare import compare, comparison, differing, expanded, labels, terminal_table
from qat.reporting.page.reading import read_run
from qat.reporting.page.watch import server


def sweep(folder: Path) -> list[Path]:
    return [
        write_run(folder / "0", with_trained(5.0, 100_000), lr=0.001),
        write_run(folder / "1", with_trained(4.4, 150_000), lr=0.002, granularity="channel"),
        write_run(folder / "2", with_trained(6.0, 160_000), lr=0.004),
        write_run(folder / "10", {"status": "failed: no memory"}, None, lr=0.008),
    ]


def test_the_best_run_is_first_and_one_without_result_last(tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(compare(sweep(tmp_path), tmp_path / "out.html"))
    rows = [line.split() for line in console.export_text().splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "0", "2", "10"]
    assert rows[0][1:5] == ["done", "4.400", f"{math.log(4.4 / 4.0):+.3f}", "150.00"] and rows[3][1] == "failed"
    said = words((tmp_path / "out.html").read_text())
    assert "1 comes closest to full precision" in said and "1 of 4 runs have no result to compare" in said


def test_the_best_of_runs_that_are_all_far_from_full_precision_is_not_good(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, with_trained(value)) for name, value in (("a", 40.0), ("b", 60.0))]
    said = comparison([read_run(one) for one in runs])
    assert '<header class="bad">' in said and "Run a comes closest" in said
    near = comparison([read_run(runs[0]), read_run(write_run(tmp_path / "c", with_trained(4.1)))])
    assert '<header class="good">' in near


def test_the_front_holds_what_no_other_beats(tmp_path: Path) -> None:
    runs = [read_run(folder) for folder in sweep(tmp_path)]
    figures = shown_figures(comparison(runs))
    pareto = next(figure for figure in figures if figure["title"] == "Pareto")
    assert pareto["data"][0]["x"] == [100_000, 150_000] and pareto["data"][1]["text"] == ["0", "1", "2"]
    parallel = next(figure for figure in figures if figure["data"][0]["type"] == "parcoords")
    axes = {axis["label"]: axis for axis in parallel["data"][0]["dimensions"]}
    assert axes["optim.lr"]["values"] == [0.001, 0.002, 0.004]
    assert axes["quant.granularity"]["ticktext"] == ["tensor", "channel"] and axes["quant.granularity"]["values"] == [0, 1, 0]
    drawable(figures)
    assert set(differing(runs)) == {"optim.lr", "quant.granularity"}


@pytest.mark.parametrize(
    ("status", "word"),
    [
        ("failed: no memory", "failed"),
        ("interrupted at step 3; resume with x", "interrupted"),
        ("stopped by EarlyStopping: flat", "stopped"),
        (None, "no result.json"),
    ],
)
def test_a_status_is_a_word(status: str | None, word: str, tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path, {"status": status} if status else None))]
    assert [*terminal_table(runs).columns[1].cells] == [word]


def test_runs_that_cannot_be_compared_yet_have_a_page(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, None, rows)) for name, rows in (("a", ROWS), ("b", None))]
    assert "No run has a result to compare yet." in words(comparison(runs))


def test_a_folder_of_runs_stands_for_them(tmp_path: Path) -> None:
    folders = sweep(tmp_path / "sweep")
    assert (
        expanded([tmp_path / "sweep"]) == folders and expanded([tmp_path]) == folders and expanded([folders[0]]) == [folders[0]]
    )
    assert labels([read_run(one) for one in folders]) == ["0", "1", "2", "10"]
    (folders[0] / "wandb/run/files").mkdir(parents=True)
    (folders[0] / "wandb/run/files/config.yaml").write_text("a tracker's own: {}")
    deep = write_run(tmp_path / "plain/2026/11/28")
    assert expanded([tmp_path]) == [deep, *folders]


def test_runs_measured_on_other_texts_are_no_order(tmp_path: Path) -> None:
    other = {**RESULT, "perplexity": {**RESULT["perplexity"], "text": "other.txt", "tokens": 2000}}
    runs = [read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b")), read_run(write_run(tmp_path / "c", other))]
    texts = "valid.txt, 1,000 tokens at context 64; other.txt, 2,000 tokens at context 64"
    said = f"Not measured alike, so that gaps are no order: {texts}"
    assert said in words(comparison(runs)) and said in str(terminal_table(runs).caption)
    assert "measured alike" not in words(comparison(runs[:2])) + str(terminal_table(runs[:2]).caption)


def test_two_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs two runs"):
        compare([write_run(tmp_path)], tmp_path / "out.html")


def test_the_verb_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    sweep(tmp_path / "sweep")
    assert verb.main(["sweep"]) == 0
    assert capsys.readouterr().out.endswith("comparison.html\n") and (tmp_path / "comparison.html").is_file()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with server(folder, 0) as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{one.server_address[1]}"
        finally:
            one.shutdown()
            thread.join()


def asked(address: str) -> str:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return str(answer.read().decode())


def test_a_watched_page_shows_what_was_written_since(tmp_path: Path) -> None:
    write_run(tmp_path, {"status": "running"}, ROWS[:3])
    with served(tmp_path) as address:
        first = asked(address + "/")
        assert 'data-live="5"' in first and "connect-src 'self'" in first and "step 30 of 100" in words(first)
        write_run(tmp_path, {"status": "running"}, ROWS[:6])
        second = asked(address + "/live")
        assert "step 60 of 100" in words(second) and len(second) < len(first) / 10
        assert shown_figures(second)[0]["data"][0]["x"] == [10, 20, 30, 40, 50, 60]
        (tmp_path / "result.json").write_text(json.dumps(RESULT))
        assert "data-live" not in asked(address + "/live")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            asked(address + "/../config.yaml")


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert verb.main(["--watch", str(write_run(tmp_path)), "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"port {port} cannot be had" in said and said.count("\n") == 1
