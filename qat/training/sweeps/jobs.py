"""One job of a sweep after another: what is done is not run again, one that fails ends nothing, and a page compares them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qat.config import TrainConfig
from qat.reporting.page.compare import compare
from qat.reporting.result import RunResult, read_result
from qat.reporting.settling import settled
from qat.terminal.lines import say
from qat.training.recording import config_hash
from qat.training.sweeps.again import as_settled
from qat.training.sweeps.outcomes import Outcome, comparison

Show = Callable[[Callable[[TrainConfig], RunResult]], tuple[int, RunResult | None, str]]


def once(config: TrainConfig, run: Callable[[TrainConfig], RunResult]) -> RunResult:
    """Run a job, going on where an earlier sweep was interrupted or failed; the result it has where it is done.

    A folder that holds another run is left to the error that says so.
    """
    folder = Path(config.run.dir or "")
    asked = config.run.dir and not config.dry_run and not config.resume
    result = read_result(folder) if asked else None
    if result is None or result.config_hash != config_hash(_as_there(config, folder)):
        return run(config)
    if result.status == "done" or result.status.startswith("stopped"):
        print(f"{folder} is done and not run again")
        return result
    return run(replace(config, resume=str(folder)) if (folder / "config.yaml").is_file() else config)


def _as_there(config: TrainConfig, folder: Path) -> TrainConfig:
    """With what a run settles as it was settled there, so that equal jobs are found equal."""
    return as_settled(settled(config), folder) if (folder / "config.yaml").is_file() else config


def job_of(
    number: int, words: str, folder: str | None, show: Show, run: Callable[[TrainConfig], RunResult]
) -> tuple[Outcome, float | None]:
    """One job, whatever becomes of it, and what a search minimises: None where it has none, which Optuna notes as
    failed and goes on; told a NaN, it ends.
    """
    try:
        code, result, status = show(lambda config: once(config, run))
    except Exception as error:
        traceback.print_exc()
        code, result, status = 1, None, f"{type(error).__name__}: {error}"
    value = result.minimised if result and not code else None
    outcome = Outcome(number, words, folder or "not run", status, code, result.objective if result else None)
    return outcome, value


def told(found: list[Outcome]) -> int:
    """Print the comparison and what became of each job; the worst exit code."""
    table = comparison(found)
    if table:
        print(*table, _page(found), sep="\n")
    elif len(found) > 1:
        print(f"no comparison: fewer than two of {len(found)} jobs were measured")
    for one in found:
        say(one.line)
    return max((one.code for one in found), default=0)


def _page(found: list[Outcome]) -> str:
    """The page that compares the jobs which have a folder, in the sweep's; its path, or why there is none."""
    folders = [folder for one in found if (folder := Path(one.folder)) and (folder / "result.json").is_file()]
    out = folders[0].parent / "comparison.html"
    try:
        compare(folders, out)
    except (ValueError, OSError) as error:
        return f"no page compares them: {error}"
    return f"comparison {out}"
