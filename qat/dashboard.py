"""The verb `python -m qat.dashboard`: a W&B workspace and a report of a project's runs, by section of the table of metrics.

With a key both are saved, and their addresses printed; without one, or with --out, their specification is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qat.config.flags import run_verb


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat.dashboard", description="Dashboards of Weights & Biases, as code.")
    parser.add_argument("--project", default="qat", metavar="P", help="PROJECT or ENTITY/PROJECT (default: qat)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the specification there, and save nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error, which is one line on stderr."""
    args = _parser().parse_args(arguments)
    return run_verb("dashboard", lambda: _show(args.project, args.out))


def _show(project: str, out: Path | None) -> None:
    from qat.reporting.dashboard.save import build

    print(*build(project, out), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
