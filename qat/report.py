"""The verb `python -m qat.report RUN...`: the page of a run made anew, or the page that compares several.

RUN                writes RUN/report.html, as the end of a run does
RUN RUN ...        a table, and a page with bytes against gap and parallel coordinates (--out)
--watch RUN        shows the page while the run trains, on 127.0.0.1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qat.config.flags import run_verb

PORT = 8765


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qat.report", description="The page of a run, or of several beside each other."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or a folder of several")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html; comparison.html of several")
    parser.add_argument("--watch", action="store_true", help="serve the run's page on 127.0.0.1 while it trains")
    parser.add_argument("--port", type=int, default=PORT, help=f"for --watch; 0: any that is free (default: {PORT})")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error, which is one line on stderr."""
    args = _parser().parse_args(arguments)
    return run_verb("report", lambda: _show(args.runs, args.out, args.watch, args.port))


def _show(folders: list[Path], out: Path | None, watching: bool, port: int) -> None:
    from rich.console import Console

    from qat.reporting.page.compare import compare, expanded
    from qat.reporting.page.reading import without_metrics
    from qat.reporting.page.render import write_report
    from qat.reporting.page.watch import watch

    runs = expanded(folders)
    if watching and len(runs) > 1:
        raise ValueError(f"--watch takes one run; given: {len(runs)}")
    if watching and out is not None:
        raise ValueError("--out is for a page that is written; --watch serves it and writes none")
    if watching:
        return watch(runs[0], port)
    if len(runs) == 1:
        print(write_report(runs[0], out))
    else:
        out = out or Path("comparison.html")
        Console(highlight=False).print(compare(runs, out))
        print(out)
    if bare := without_metrics(runs):
        print(f"qat.report: no step was logged of {', '.join(map(str, bare))}: no curves are drawn", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
