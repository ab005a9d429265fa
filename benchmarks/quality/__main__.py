"""`python -m benchmarks.quality run|table|picture|list`: train the study's rows, and print what came of them.

python -m benchmarks.quality run --shared ../shared --out runs/quality --jobs 2
python -m benchmarks.quality table --out runs/quality
python -m benchmarks.quality picture --out runs/quality --file docs/quality.svg
"""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path

from benchmarks.quality import rows, table
from benchmarks.quality.runs import chosen, done, execute_all


def main() -> None:
    """Train the rows of rows.yaml under equal budgets, and compare them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=main.__doc__)
    parser.add_argument("what", choices=["run", "table", "picture", "list"])
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the runs")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder that holds models/ and data/")
    parser.add_argument("--only", nargs="*", default=["*"], help="shell patterns of runs, MODEL/BUDGET/ROW/SEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a thread each")
    parser.add_argument("--file", type=Path, default=Path("quality.svg"), help="of the picture")
    asked = parser.parse_args()
    if asked.jobs < 1:
        parser.error(f"--jobs {asked.jobs} is not allowed: at least 1")
    study = rows.read()
    if asked.what in ("table", "picture"):
        return show(study, asked)
    places = {"shared": str(asked.shared.resolve()), "out": str(asked.out.resolve())}
    if not asked.shared.is_dir() and asked.what == "run":
        raise SystemExit(f"skipped: {asked.shared} is not there")
    found = failed = 0
    for plan in study.plan:
        wanted = [runs for runs in study.runs(plan) if any(matches(run, asked.only) for run in runs)]
        queue = [run for runs in wanted for run in chosen(study, asked.out, runs) if matches(run, asked.only)]
        found += len(wanted)
        if asked.what == "list":
            for run in queue:
                print("done" if done(asked.out / run.name) else "open", run.name, *run.arguments(places))
        else:
            failed += execute_all(queue, asked.out, places, asked.jobs)
    if not found:
        raise SystemExit(f"no run of the study is called {' or '.join(asked.only)}; `list` names them")
    if failed:
        raise SystemExit(f"{failed} runs failed")


def matches(run: rows.Run, patterns: list[str]) -> bool:
    """Whether its name fits one of the shell patterns."""
    return any(fnmatch.fnmatch(run.name, pattern) for pattern in patterns)


def show(study: rows.Study, asked: argparse.Namespace) -> None:
    """Print the tables or draw the picture; SystemExit where no run is done or the file cannot be written."""
    if not (lines := list(table.tables(study, asked.out))):
        raise SystemExit(f"{asked.out} holds no run of the study that is done")
    if asked.what == "table":
        return print("\n".join(lines))
    from benchmarks.quality import picture

    try:
        picture.save(table.points(study, asked.out), asked.file, table.full_precision(study, asked.out))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{asked.file}: {error}") from error


if __name__ == "__main__":
    main()
